"""Published weights, read and written: safetensors files, tensor names, Hugging Face directories."""

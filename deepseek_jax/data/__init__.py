"""Text in, batches of token ids out; a batch is a pure function of (seed, sample number).

corpus      which files a source names, and their documents
rows        a row of a file as a document: its text, or its conversation
readers     one reader per file type: .txt .py .md .jsonl .json .parquet .array_record
compression the same behind .gz or .zst
tokenizer   bytes, any tokenizer.json, or DeepSeek's own
tokenise    documents to ids, on every core
store       a corpus tokenised once, memory-mapped from the cache directory
once        one process builds it, the others wait
watch       how far that is, for whoever shows it
holdout     which documents, or which ends of them, are kept for evaluation
noise       the counter-based random numbers that every choice below is made with
fim         prefix-suffix-middle documents (V3 section 4.1)
packing     documents laid end to end and cut into windows: which tokens make sample n of epoch e
pipeline    grain: open_split(...).rows(start, count), and read-ahead
messages    the messages of a conversation, checked and in order
chat        prompts of every generation, and a model's text back to a message

conversations         which tokens of a conversation are learnt, in which context
conversation_packing  whole conversations side by side in windows
marked_text           text in which special tokens are spelled out

Nothing here knows of a model, and no state is kept but the number of the next sample.
"""

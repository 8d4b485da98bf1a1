# deepseek_jax on NVIDIA GPUs:   docker build -f launch/cluster/cuda13.Dockerfile -t deepseek-jax:cuda13 .
# The wheels of jax[cuda13] bring CUDA, cuDNN and NCCL with them; the host brings the driver (580 or later).
FROM python:3.12-slim
# Bounds of versions are in setup.cfg; `pip freeze` in the image shows what was taken.
WORKDIR /opt/deepseek_jax
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[gpu,data,serve]"
# What the container runtime passes through: computing, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["deepseek-jax"]

# deepseek_jax on TPUs:   docker build -f launch/cluster/tpu.Dockerfile -t deepseek-jax:tpu .
FROM python:3.12-slim
# Bounds of versions are in setup.cfg; `pip freeze` in the image shows what was taken.
WORKDIR /opt/deepseek_jax
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[tpu,data,serve]"
ENTRYPOINT ["deepseek-jax"]

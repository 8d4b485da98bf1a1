# deepseek_jax on CPUs:   docker build -f launch/cluster/cpu.Dockerfile -t deepseek-jax:cpu .
FROM python:3.12-slim
# Bounds of versions are in setup.cfg; `pip freeze` in the image shows what was taken.
WORKDIR /opt/deepseek_jax
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[data,serve]"
# SIGTERM reaches the run itself, for no shell is in between.
ENTRYPOINT ["deepseek-jax"]

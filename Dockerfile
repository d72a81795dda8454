# qwen15 on a CPU; docs/containers_en.md says how to build and run it.
# The wheel is built beside a compiler, and the image keeps the wheel alone.
FROM python:3.11-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
# MindSpore's libraries want OpenMP's. Versions are those of the base image's Debian.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]" && rm -r /wheels \
    && useradd --create-home --uid 1000 qwen15 && mkdir /cache && chown qwen15 /cache
USER 1000
ENV HF_HOME=/cache
WORKDIR /home/qwen15
EXPOSE 8000
ENTRYPOINT ["qwen15"]
CMD ["doctor"]

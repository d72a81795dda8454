# qwen15 on a CPU: docker build -t qwen15 . && docker run -it --rm -v ~/.cache/huggingface:/cache qwen15 predict --load_checkpoint OWNER/NAME --chat
# The wheel is built beside a compiler, and the image keeps the wheel alone.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
# MindSpore's libraries want OpenMP's.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels \
    && useradd --create-home qwen15 && mkdir /cache && chown qwen15 /cache
USER qwen15
ENV HF_HOME=/cache
WORKDIR /home/qwen15
ENTRYPOINT ["qwen15"]
CMD ["doctor"]

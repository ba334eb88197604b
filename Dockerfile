# Build:  docker build -t servetune .
# Run:    docker run -p 8000:8000 -v servetune:/data -e SERVETUNE_API_KEYS='["stu_me.a-long-random-secret"]' servetune
FROM python:3.12-slim

RUN useradd --create-home --uid 10001 servetune \
    && mkdir /data && chown servetune /data
WORKDIR /app

# The same steps as `make setup`, without the development tools.
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY servetune servetune
COPY server server
COPY adapters adapters
COPY clients clients
COPY nano nano
COPY evals evals
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[server]'

USER 10001
ENV SERVETUNE_HOME=/data SERVETUNE_HOST=0.0.0.0 SERVETUNE_PORT=8000
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# Listening beyond loopback needs user keys: without SERVETUNE_API_KEYS the server says so and ends.
ENTRYPOINT ["servetune"]
CMD ["serve"]

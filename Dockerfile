# Syncward: scheduler, worker or CLI in one image. Non-root, locked dependencies, read-only file system.
#   docker build -t syncward .
#   docker run --rm --env-file .env syncward worker
FROM python:3.13-slim AS build
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_HASHES=1
COPY requirements.lock all.lock
RUN python -m venv /tools && /tools/bin/pip install -r all.lock
COPY deploy/requirements.lock production.lock
RUN python -m venv /venv && /venv/bin/pip install -r production.lock
COPY . .
RUN /tools/bin/python -m hatchling build -t wheel -d /wheel \
 && PIP_REQUIRE_HASHES=0 /venv/bin/pip install --no-deps /wheel/*.whl

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin syncward
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SYNCWARD_METRICS_HOST=127.0.0.1 SYNCWARD_METRICS_PORT=9464 SYNCWARD_LOG_FORMAT=json
USER 10001
WORKDIR /
STOPSIGNAL SIGTERM
# 401: it answers, and wants the token of SYNCWARD_METRICS_TOKEN_FILE.
HEALTHCHECK --interval=15s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 9464, timeout=2); c.request('GET', '/metrics'); raise SystemExit(c.getresponse().status not in (200, 401))"]
ENTRYPOINT ["syncward"]
CMD ["--help"]

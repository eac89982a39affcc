# One image for every process: statecache flusher, worker, serve, and the command line.
# The wheel is built and installed in the first stage; the second has Python, the packages, and nothing that builds.
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY statecache statecache
COPY workers workers
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m venv --without-pip /opt/statecache \
    && pip --python /opt/statecache/bin/python install --no-cache-dir /wheels/*.whl

FROM python:3.11-slim-bookworm
RUN pip uninstall --yes --quiet setuptools wheel pip \
    && useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin statecache
COPY --from=build /opt/statecache /opt/statecache
ENV PATH=/opt/statecache/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
# The stores can be reached with this container's settings. docker-compose.yml asks each service more directly.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s CMD ["statecache", "status", "--json"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["statecache"]
CMD ["--help"]

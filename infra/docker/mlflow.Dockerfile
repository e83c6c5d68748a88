# syntax=docker/dockerfile:1
# The tracking server: MLflow with PostgreSQL's and S3's clients.
#
#   docker build -f infra/docker/mlflow.Dockerfile -t registry.example.com/cvft-mlflow:3.17.2 .
#
# Reads MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION, MLFLOW_SERVER_ALLOWED_HOSTS and the AWS variables.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY constraints.txt /
RUN pip install -c /constraints.txt mlflow psycopg2-binary boto3 && pip check

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 1000 mlflow && useradd --uid 1000 --gid 1000 --create-home mlflow
COPY --from=build /usr/local /usr/local
COPY --chmod=0755 infra/docker/cvft-mlflow-alive /usr/local/bin/
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    GIT_PYTHON_REFRESH=quiet
USER 1000:1000
WORKDIR /home/mlflow
EXPOSE 5000
HEALTHCHECK --interval=20s --timeout=5s --start-period=120s CMD ["cvft-mlflow-alive"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]

# MLflow's server with artifacts on S3, without torch and Ray: a twentieth of the other image.
#   docker build -f infra/mlflow.Dockerfile -t fsdino-mlflow:0.1.0 .
FROM python:3.11.14-slim-bookworm
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt mlflow boto3 \
    && useradd --create-home --uid 1000 mlflow && mkdir /mlflow && chown 1000 /mlflow
USER 1000
WORKDIR /mlflow
ENTRYPOINT ["mlflow"]
CMD ["server", "--host", "0.0.0.0", "--port", "5000"]

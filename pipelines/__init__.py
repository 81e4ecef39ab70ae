"""The commands: Ray Data and Ray Train jobs over feature stores, tracked in MLflow."""

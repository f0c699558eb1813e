-- Beside the one that the image makes: users and permissions have a database of their own.
CREATE DATABASE mlflow_auth OWNER mlflow;

"""The only user of MLflow: the delivery process, its clients, and what it delivers to the server."""

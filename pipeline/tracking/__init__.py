"""The one home of MLflow: the delivery process, what talks to it, and what it brings to the server."""

"""The files that MLflow 3.17.2 writes beside a student's own, as far as they can be written without MLflow."""

import json
from typing import Any

from pipeline.served import code

PARTS = {"net": "student.onnx", "meta": "meta.json", "weights": "student.safetensors"}
"""Files in `artifacts/`, by the names that the MLmodel gives them."""
FLAVOR: dict[str, Any] = {
    "artifacts": {name: {"path": f"artifacts/{file}", "uri": f"/tmp/model/{file}"} for name, file in PARTS.items()},
    "cloudpickle_version": "3.1.2",
    "code": None,
    "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
    "loader_module": "mlflow.pyfunc.loaders.code_model",
    "model_code_path": "/tmp/model/student_pyfunc.py",
    "python_version": "3.11.7",
    "streamable": False,
}


def files(**more: str) -> dict[str, str]:
    """Name -> text; `more` goes into the MLmodel."""
    return {
        "MLmodel": json.dumps({"flavors": {"python_function": FLAVOR}, **more}),
        "student_pyfunc.py": code.CODE,
        "requirements.txt": "mlflow==3.17.2\nnumpy==2.4.6\nonnxruntime==1.31.1\npillow==13.0.0",
    }

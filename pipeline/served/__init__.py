"""The served student: its code, its pictures and its bundle of files. Needs numpy, pillow and onnxruntime only."""

"""``python -m torch_nvfp4``."""

from torch_nvfp4.cli import app

app(prog_name="torch-nvfp4")

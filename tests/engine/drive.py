"""Run a manifest with the faulty renderer; also a program, to be interrupted and killed.

python drive.py MANIFEST OUT LOG ROW_MS [OUTPUT, as JSON]
"""

import json
import sys
from pathlib import Path
from typing import Any

from raydiff.bench.null_model import MODEL
from raydiff.config import RunConfig
from raydiff.engine.known_models import KnownModels
from raydiff.engine.placement import fused_layout
from raydiff.engine.render import RunSummary, run_manifest
from raydiff.manifest.reader import open_manifest

RENDERER = "faulty_renderer:FaultyRenderer"


def drive(
    manifest: Path | str,
    out: Path | str,
    log: Path | str,
    *,
    row_ms: float = 1,
    num_gpus: int = 0,
    renderer: str = RENDERER,
    engine: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **callbacks: Any,
) -> RunSummary:
    """Render with two workers."""
    config = RunConfig.model_validate(
        {
            "out": str(out),
            "model": {"name": MODEL.name},
            "engine": {"batch_size": 4, **(engine or {})},
            "output": {"commit_s": 0.2, **(output or {})},
        }
    )
    return run_manifest(
        open_manifest(manifest),
        config=config,
        models=KnownModels(lambda name: MODEL),
        renderer=renderer,
        arguments={"log": str(log), "row_ms": row_ms},
        layout=fused_layout(2, num_gpus=num_gpus),
        **callbacks,
    )


if __name__ == "__main__":
    manifest, out, log, row_ms, *rest = sys.argv[1:]
    output = json.loads(rest[0]) if rest else None
    summary = drive(manifest, out, log, row_ms=float(row_ms), output=output)
    sys.exit(summary.exit_status)

"""`make wheel` runs this in the new environment, in a folder with the output of `cmai-fast info --json`."""

import json
from pathlib import Path

import torch

import cmai_fast
from cmai_fast import ops
from cmai_fast.pipeline import Pipeline

facts = json.loads(Path("info.json").read_text())
package = Path(cmai_fast.__file__)
assert "site-packages" in package.parts, f"cmai_fast is imported from {package}, not from the wheel"
assert facts["backends"]["cpu"] == "ready", f"the compiled extension does not run: {facts['backends']['cpu']}"

clean = torch.rand(2, 3, 8, 8)
adv, radius = clean.clone(), torch.full((2,), 0.1)
ops.pgd_linf_step_(adv, torch.ones_like(clean), clean, radius, radius)
assert torch.equal(adv, (clean + 0.1).clamp(0, 1))

pipeline = Pipeline.load("easyvqa-llava")  # a bundled model: its files are in the wheel
assert pipeline.heads is not None
print(f"   cmai_fast {cmai_fast.__version__} from {package.parent}: backends and bundled model work")

# %% [markdown]
# # afa in ten minutes
#
# Trains a small network on rendered objects, shows what it learned, and searches with a picture.
# At most ten minutes on a TPU v5e-1 or on two CPU cores.
#
# %% [markdown]
# ## Install
#
# `SOURCE` is only read if afa is not installed yet.

# %% [install]
# %% [markdown]
# ## Check the machine
#
# The last line is `ready`, or what is missing and how to mend it.

# %%
from launch import doctor

assert doctor.main([]) == 0


# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import HTML, Image, Markdown, display

import afa

FAST = bool(os.environ.get("FAST"))  # tests: a few steps of tiny networks
RUN = Path(os.environ.get("RUNS", "runs")) / "quickstart"

# %% [markdown]
# ## Train
#
# F embeds images; G and D learn, without labels, to restore corrupted ones. Everything is in `RUN`: an
# interrupted cell, run again, continues from its last checkpoint.

# %%
# Fewer steps than the recipe: 200 of F, of which 60 with feature augmentation, then 240 of G and D.
SHORT = {"train.steps": "200", "train.plain": "140", "train.generator_steps": "240"}
EXPERIMENT, CHANGES = ("debug", {}) if FAST else ("afa_resnet18", SHORT)
result = afa.run(EXPERIMENT, scale="laptop", workdir=RUN, **CHANGES)

# %% [markdown]
# ## Results on objects that were not trained on
#
# R@1: share of queries whose first result is of the same object. MAP@R also counts the others.

# %%
rows = ["| descriptor | clean R@1 | MAP@R | corrupted R@1 | MAP@R |", "|---|---|---|---|---|"]
for name, variant in result["metrics"]["test"].items():
    clean, corrupted = (variant["leave_one_out"][each] for each in ("clean", "trained"))
    cells = [
        100 * each[metric] for each in (clean, corrupted) for metric in ("recall_at_1", "map_at_r")
    ]
    rows.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
display(Markdown("\n".join(rows)))

# %% [markdown]
# The report has curves, restored images and example searches.

# %%
display(
    HTML(
        f"<div><iframe srcdoc='{(RUN / 'report.html').read_text().replace(chr(39), '&#39;')}' "
        "width='100%' height='700'></iframe></div>"
    )
)

# %% [markdown]
# ## Search with a picture
#
# A picture of a test object, blurred and covered in part. Any JPEG or PNG of your own works as well.

# %%
from afa.data.corruptions import corrupt
from afa.data.images import decode, encode_jpeg
from afa.data.sources import registry
from experiments import search

test = registry.load(afa.load(RUN).config.data).test
picture = decode(test.images[len(test.labels) // 2])
poor = corrupt(picture, "occlusion", 3, np.random.default_rng(0))
(RUN / "query.jpg").write_bytes(encode_jpeg(poor))
assert search.main([f"--run={RUN}", str(RUN / "query.jpg")]) == 0
for sheet in sorted((RUN / "searches").iterdir()):
    display(Image(filename=str(sheet)))

# %% [markdown]
# # A sweep and its table
#
# Plans a sweep of losses and seeds, runs it small, and reads its table: means, 95 % intervals and paired
# differences.
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

from IPython.display import SVG, Markdown, display

import afa
from afa.runs import results

FAST = bool(os.environ.get("FAST"))  # tests: fewer runs
HOME = Path(os.environ.get("RUNS", "runs"))
VALUES = {"loss.name": ["norm_softmax", "arcface"]}
SEEDS = 1 if FAST else 3

# %% [markdown]
# ## Run
#
# A run that is done is not repeated: after an interruption, run the cell again. `debug` takes under a
# minute per run, and its metrics are meaningless; for figures that mean something use `afa_resnet18`.

# %%
content = afa.sweep(
    "debug",
    VALUES,
    seeds=SEEDS,
    scale="laptop",
    out=HOME / "losses",
    store=HOME / "store",
    show=lambda sweep, states: print(", ".join(sorted(states.values())), end="\r"),
)
assert not content["failed"]

# %% [markdown]
# ## Table
#
# Runs of a group differ in their seed. The difference is to the group of reference, over the same seeds
# and queries; an interval over seeds needs three.

# %%
runs = [HOME / "store" / run["name"] for run in content["runs"]]
groups = results.groups(runs, ["loss.name"])
KEY = ("fused", "leave_one_out", "clean")
rows = results.compared(groups, "debug loss.name=norm_softmax", KEY, "map_at_r")
table = results.by_group(groups, rows, "fused")
from afa.runs.result_files import markdown

display(Markdown(markdown(table.texts())))

# %% [markdown]
# ## Plot

# %%
from afa.report.charts import interval_chart

drawn = [(row.group, row.classes.mean, row.classes.low, row.classes.high) for row in rows]
display(SVG(interval_chart(drawn, "MAP@R, %")))

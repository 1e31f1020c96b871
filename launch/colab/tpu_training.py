# %% [markdown]
# # Train on a TPU
#
# Trains `afa_resnet50` at full scale and keeps everything in a mounted directory, so that a runtime that
# ends costs only the steps since its last checkpoint: open the notebook again and run all cells.
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

from IPython.display import HTML, display

import afa
from afa import parallel

FAST = bool(os.environ.get("FAST"))  # tests: a few steps of tiny networks
DRIVE = not FAST and os.path.isdir("/content")  # a Colab runtime

# %% [markdown]
# ## A directory that outlives the runtime
#
# On Colab: Google Drive. Elsewhere: set `HOME` to a mounted disk.

# %%
HOME = Path(os.environ.get("RUNS", "runs"))
if DRIVE:
    from google.colab import drive  # pyright: ignore

    drive.mount("/content/drive")
    HOME = Path("/content/drive/MyDrive/afa")
RUN = HOME / "tpu_training"
print(f"{RUN}: {'continues' if RUN.exists() else 'starts'}; devices: {parallel.platform()}")

# %% [markdown]
# ## Train
#
# The batch is divided among all devices. `data.batch_size=128` fits one v5e chip; with more chips,
# multiply it and `optim.learning_rate`. From random weights, without a download; to fine-tune published
# weights, install the extra `hub` and remove `backbone.weights`.

# %%
settings = {} if FAST else {"backbone.weights": "random"}
scale = "full" if parallel.accelerated() else "laptop"
result = afa.run("debug" if FAST else "afa_resnet50", scale=scale, workdir=RUN, **settings)

# %% [markdown]
# ## Results

# %%
fused = result["metrics"]["test"]["fused"]["leave_one_out"]["clean"]
print(
    f"R@1 {100 * fused['recall_at_1']:.1f} %, MAP@R {100 * fused['map_at_r']:.1f} %, "
    f"{result['timings']['training_steps'] / result['step']:.3f} s per step"
)
display(HTML(f"<a href='{RUN / 'report.html'}'>{RUN / 'report.html'}</a>"))

# %% [markdown]
# ## Continue
#
# The same call finds the finished run and evaluates it again; an unfinished one continues from its last
# checkpoint, with the same result as without an interruption.

# %%
again = afa.run("debug" if FAST else "afa_resnet50", scale=scale, workdir=RUN, **settings)
assert again["step"] == result["step"]

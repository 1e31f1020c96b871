# %% [markdown]
# # Search your own pictures
#
# A folder of pictures, or a data set of TFDS, goes in; a searchable index and a page with the results
# of example searches come out. The folder has one subfolder per class (object), which is what the
# network is trained on; pictures to be searched need no classes.
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

from IPython.display import Image, display

import afa

FAST = bool(os.environ.get("FAST"))  # tests: a few steps of tiny networks
RUNS = Path(os.environ.get("RUNS", "runs"))
RUN, INDEX = RUNS / "your_pictures", RUNS / "your_index"

PICTURES = ""  # a folder with one subfolder per class; empty: rendered objects, to try it out
TFDS = ""  # or the name of a data set of TFDS, such as "imagenette"

# %% [markdown]
# ## Pictures
#
# Without a folder or a data set, this cell writes a folder of rendered objects.

# %%
if not PICTURES and not TFDS:
    from afa.data.images import encode_jpeg
    from afa.data.synthetic.render import render

    PICTURES = str(RUNS / "rendered")
    for number in range(24 if FAST else 40):
        folder = Path(PICTURES) / f"object_{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(6 if FAST else 12):
            path = folder / f"{view:02d}.jpg"
            path.write_bytes(encode_jpeg(render(0, number, view, 64)))

# %% [markdown]
# ## Train
#
# Run the cell again after an interruption: it continues.

# %%
changes = {"data.name": f"tfds:{TFDS}"} if TFDS else {"data.name": "folder", "data.path": PICTURES}
result = afa.run("debug" if FAST else "afa_resnet18", workdir=RUN, scale="auto", **changes)

# %% [markdown]
# ## Index
#
# The index holds all pictures, also those of classes that were trained on. Pictures are added later
# with `experiments.index add`.

# %%
from experiments import index, search

if TFDS:
    INDEX = RUN / "embeddings"  # the pictures of the test split
else:
    assert index.main(["build", f"--run={RUN}", f"--images={PICTURES}", f"--out={INDEX}"]) == 0
assert index.main(["info", f"--index={INDEX}"]) == 0

# %% [markdown]
# ## Search
#
# Any picture will do as a query. Here: three pictures of classes that were not trained on.

# %%
from afa.data.images import decode, encode_jpeg
from afa.data.sources import registry

test = registry.load(afa.load(RUN).config.data).test
queries = [RUNS / f"query_{number}.jpg" for number in range(3)]
for number, query in enumerate(queries):
    image = test.images[number * len(test.labels) // 3]
    query.write_bytes(encode_jpeg(decode(image)))
sheets = RUNS / "gallery"
words = [f"--run={RUN}", f"--index={INDEX}", f"--sheets={sheets}", "--results=8"]
assert search.main([*words, *map(str, queries)]) == 0
for sheet in sorted(sheets.iterdir()):
    display(Image(filename=str(sheet)))

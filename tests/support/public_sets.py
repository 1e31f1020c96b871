"""Small imitations of public data sets, in their published file layout."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afa.data.images import encode_jpeg

SIDE = 20


def image(path: Path, tone: int, seed: int = 0) -> Path:
    """Writes an image of about this grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-9, 10, (SIDE, SIDE, 3))
    path.write_bytes(encode_jpeg(np.clip(tone + noise, 0, 255).astype(np.uint8)))
    return path


def inshop(
    root: Path, train: int = 5, test: int = 3, top: str = "Img", where: str = "Eval"
) -> Path:
    """Writes training items of 3 images, and test items of 1 query and 2 gallery images."""
    lines = []
    for item in range(train + test):
        kinds = ("train",) * 3 if item < train else ("query", "gallery", "gallery")
        for number, kind in enumerate(kinds):
            name = f"img/WOMEN/Tees/id_{item:08d}/{number:02d}_1_front.jpg"
            image(root / top / name, 25 * item + 20, number)
            lines.append(f"{name}       id_{item:08d} {kind}")
    path = root / where / "list_eval_partition.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [str(len(lines)), "image_name item_id evaluation_status"]
    path.write_text("\n".join([*head, *lines]) + "\n")
    return root


def landmark_id(number: int) -> str:
    return f"{number:016x}"[::-1]


def gldv2(root: Path, landmarks: int = 30, each: int = 2, clean: bool = True) -> Path:
    """Writes training images, an index of 6 images, and 4 test images with both solutions."""
    train = {
        100 + 7 * landmark: [landmark_id(landmark * each + i) for i in range(each)]
        for landmark in range(landmarks)
    }
    train[99] = [landmark_id(9999)]  # a landmark with one image
    for landmark, names in train.items():
        for name in names:
            image(root / "train" / name[0] / name[1] / name[2] / f"{name}.jpg", landmark % 255)
    if clean:
        rows = [f"{landmark},{' '.join(names)}" for landmark, names in train.items()]
        (root / "train_clean.csv").write_text("\n".join(["landmark_id,images", *rows]) + "\n")
    else:
        rows = [f"{n},http://x/{n}.jpg,{c}" for c, names in train.items() for n in names]
        (root / "train.csv").write_text("\n".join(["id,url,landmark_id", *rows]) + "\n")
    index = [landmark_id(500 + i) for i in range(6)]
    test = [landmark_id(700 + i) for i in range(4)]
    for part, names in (("index", index), ("test", test)):
        for i, name in enumerate(names):
            image(root / part / name[0] / name[1] / name[2] / f"{name}.jpg", 40 * i)
    (root / "index.csv").write_text("\n".join(["id", *index]) + "\n")
    (root / "retrieval_solution_v2.1.csv").write_text(
        "id,images,Usage\n"
        f"{test[0]},{index[0]} {index[1]},Public\n"
        f"{test[1]},{index[2]},Private\n"
        f"{test[2]},None,Ignored\n"
        f"{test[3]},{index[4]} {index[5]},Private\n"
    )
    (root / "recognition_solution_v2.1.csv").write_text(
        "id,landmarks,Usage\n"
        f"{test[0]},100,Public\n{test[1]},107 114,Private\n"
        f"{test[2]},,Private\n{test[3]},121,Private\n"
    )
    return root


def revisited(
    root: Path, name: str = "roxford5k", gallery: int = 8, protocol: int = 2, numpy: bool = False
) -> Path:
    """Writes a ground truth of 3 queries and `gallery` images, and `jpg/`."""
    names = [f"all_souls_{i:06d}" for i in range(gallery)]
    queries = [f"query_{i}" for i in range(3)]
    for i, each in enumerate([*names, *queries]):
        image(root / "jpg" / f"{each}.jpg", 20 * i)

    def indices(*values: int) -> Sequence[int]:
        return np.array(values, np.int64) if numpy else list(values)  # pyright: ignore

    box = [np.float64(2.4), 3.0, 11.5, 18.0] if numpy else [2.4, 3.0, 11.5, 18.0]
    ground_truth = [
        {"bbx": box, "easy": indices(0, 1), "hard": indices(2), "junk": indices(3)},
        {"bbx": box, "easy": indices(4), "hard": indices(5, 6), "junk": indices()},
        {"bbx": box, "easy": indices(), "hard": indices(7), "junk": indices(0)},
    ]
    content = {"imlist": names, "qimlist": queries, "gnd": ground_truth}
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol))
    return root

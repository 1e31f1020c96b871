"""Small TFDS data sets with the features of real ones, written without TensorFlow."""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds

IMAGE, TEXT = tfds.features.Image, tfds.features.Text
CLASS, BOX = tfds.features.ClassLabel, tfds.features.BBoxFeature

# name -> features, and the classes of each split
MOCKS = {
    "caltech_birds2011": (
        {"image": IMAGE(), "segmentation_mask": IMAGE(shape=(None, None, 1)),
         "image/filename": TEXT(), "label": CLASS(num_classes=10), "bbox": BOX()},
        {"train": range(10), "test": range(10)},
    ),
    "cars196": (
        {"image": IMAGE(), "label": CLASS(names=[f"car{i}" for i in range(9)]),
         "bbox": BOX()},
        {"train": range(9), "test": range(9)},
    ),
    "stanford_online_products": (
        {"image": IMAGE(), "class_id": CLASS(num_classes=12),
         "super_class_id": CLASS(num_classes=3), "super_class_id/num": CLASS(num_classes=3)},
        {"train": range(7), "test": range(7, 12)},
    ),
    "omniglot": (
        {"image": IMAGE(), "alphabet": CLASS(num_classes=3), "alphabet_char_id": np.int64,
         "label": CLASS(num_classes=9)},
        {"train": range(5), "test": range(5, 9), "small1": range(5)},
    ),
    "cifar100": (
        {"id": TEXT(), "image": IMAGE(shape=(8, 8, 3)), "coarse_label": CLASS(num_classes=4),
         "label": CLASS(num_classes=8)},
        {"train": range(8), "test": range(8)},
    ),
    "oxford_flowers102": (
        {"image": IMAGE(), "label": CLASS(num_classes=8), "file_name": TEXT()},
        {"train": range(8), "test": range(8), "validation": range(8)},
    ),
    "imagenet2012": (
        {"image": IMAGE(), "label": CLASS(num_classes=8), "file_name": TEXT()},
        {"train": range(8), "validation": range(8), "test": [-1]},
    ),
    "cmaterdb": (
        {"image": IMAGE(shape=(8, 8, 3)), "label": CLASS(num_classes=8)},
        {"train": range(8), "test": range(8)},
    ),
    "something_else": (
        {"image": IMAGE(), "kind": CLASS(num_classes=8)},
        {"train": range(8), "extra": range(8)},
    ),
}  # fmt: skip
KEYS = {"stanford_online_products": "class_id", "something_else": "kind"}


def png(value):
    return cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes()


def write(name, features, classes, data_dir, file_format="array_record", per_class=2):
    """Writes a data set of this name with two images per class and split."""
    key = KEYS.get(name, "label")

    def examples(self, labels, split):
        for i, label in enumerate(np.repeat(list(labels), per_class).tolist()):
            example = {}
            for field, feature in features.items():
                if isinstance(feature, tfds.features.Image):
                    # Writing arrays would need TensorFlow.
                    grey = field == "segmentation_mask"
                    example[field] = io.BytesIO(png(7 if grey else 20 * (label + 1)))
                elif isinstance(feature, tfds.features.Text):
                    example[field] = f"{split}_{i}.jpg"
                elif isinstance(feature, tfds.features.BBoxFeature):
                    example[field] = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
                else:
                    example[field] = label if field == key else 0
            yield i, example

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def splits(self, manager):
        return {split: self._generate_examples(c, split) for split, c in classes.items()}

    kind = type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "name": name,
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": info,
            "_split_generators": splits,
            "_generate_examples": examples,
            "__module__": __name__,
        },
        skip_registration=True,
    )
    kind(data_dir=data_dir, file_format=file_format).download_and_prepare()

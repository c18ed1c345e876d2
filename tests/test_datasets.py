"""Readers, each on a small fixture in the data set's official format, whole and damaged."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captum_transformer_attr.datasets import (
    BoxedImages,
    CocoInstances,
    DatasetError,
    EasyVqa,
    Eraser,
    ImageExample,
    ImageNetSegmentation,
    ImageNetValidation,
    Joined,
    LabelledImages,
    Region,
    Sst2,
    SstRationales,
    TinyImageNetValidation,
)


def picture(path: Path, colour: tuple[int, int, int] = (200, 10, 20), size: tuple[int, int] = (6, 4)) -> None:
    """A one-coloured PNG content under any suffix, so that pixels come back exactly; size is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")


class TestExamples:
    def test_mask_is_the_union_of_regions_and_filled_boxes(self) -> None:
        spot = np.zeros((4, 6), dtype=bool)
        spot[3, 5] = True
        image = np.zeros((4, 6, 3), dtype=np.uint8)
        example = ImageExample("a", image, 1, (Region(1, box=(1, 0, 3, 2)), Region(2, mask=spot)))
        assert example.mask().astype(int).tolist() == [
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
        ]
        assert example.mask(2).sum() == 1
        assert not ImageExample("a", image).mask().any()


class TestLabelledImages:
    def folder(self, path: Path) -> Path:
        picture(path / "a.jpg", (255, 0, 0))
        picture(path / "b.jpg", (0, 255, 0))
        (path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
        truncated = io.BytesIO()
        Image.effect_noise((40, 40), 50).save(truncated, format="JPEG")
        (path / "cut.jpg").write_bytes(truncated.getvalue()[:-200])
        names = ["a.jpg", "b.jpg", "broken.jpg", "cut.jpg", "lost.jpg"]
        labels = {name: {"class_index": i * 10, "name": name} for i, name in enumerate(names)}
        (path / "labels.json").write_text(json.dumps(labels))
        return path

    def test_damaged_and_missing_files_are_named_and_counted(self, tmp_path: Path) -> None:
        reader = LabelledImages(self.folder(tmp_path))
        examples = list(reader)
        assert [(e.name, e.label) for e in examples] == [("a.jpg", 0), ("b.jpg", 10)]
        assert examples[1].image.shape == (4, 6, 3)
        assert examples[1].image[0, 0].tolist() == [0, 255, 0]
        assert [s.index for s in reader.skipped] == [2, 3, 4]
        for entry, name in zip(reader.skipped, ["broken.jpg", "cut.jpg", "lost.jpg"], strict=True):
            assert name in entry.reason
            assert "\n" not in entry.reason
        list(reader)
        assert len(reader.skipped) == 3

    def test_strict_reading_stops_at_the_first_and_only_damage_is_refused(self, tmp_path: Path) -> None:
        reader = LabelledImages(self.folder(tmp_path))
        with pytest.raises(DatasetError, match="broken.jpg is not an image"):
            list(reader.examples(on_error="raise"))
        with pytest.raises(DatasetError, match="none of 2 examples could be read"):
            list(reader.examples([2, 4]))
        assert [i for i, _ in reader.examples([1, 0])] == [1, 0]
        with pytest.raises(IndexError):
            reader[5]

    @pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
    def test_damaged_archives_are_named(self, kind: str, tmp_path: Path) -> None:
        # Whatever byte is changed: a DatasetError that names the archive, or the right pictures.
        folder, archive = self.folder(tmp_path / "data"), tmp_path / f"data.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
                for file in sorted(folder.iterdir()):
                    content.write(file, file.name)
        else:
            with tarfile.open(archive, f"w:{kind[4:]}") as content:
                content.add(folder, "data")
        whole, generator = archive.read_bytes(), np.random.default_rng(0)
        for _ in range(60):
            place = int(generator.integers(len(whole)))
            archive.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            try:
                assert {example.label for example in LabelledImages(archive)} <= {0, 10, 20, 30}
            except DatasetError as error:
                assert archive.name in str(error) and "\n" not in str(error)

    def test_bad_index_file(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no files named labels.json"):
            LabelledImages(tmp_path)
        (tmp_path / "labels.json").write_text("{")
        with pytest.raises(DatasetError, match="not valid JSON"):
            LabelledImages(tmp_path)
        (tmp_path / "labels.json").write_text('["a.jpg"]')
        with pytest.raises(DatasetError, match="class_index"):
            LabelledImages(tmp_path)
        (tmp_path / "labels.json").write_text('{"a.jpg": {"class_index": Infinity}}')
        with pytest.raises(DatasetError, match="class_index"):
            LabelledImages(tmp_path)
        (tmp_path / "labels.json").write_text("[" * 100_000)
        with pytest.raises(DatasetError, match="nested too deeply"):
            LabelledImages(tmp_path)
        (tmp_path / "labels.json").write_text('{"a\\u0000.jpg": {"class_index": 1}}')
        with pytest.raises(DatasetError, match="none of 1 examples"):
            list(LabelledImages(tmp_path))
        with pytest.raises(DatasetError, match="does not exist"):
            LabelledImages(tmp_path / "nowhere")


@pytest.mark.parametrize("reader", [Sst2, SstRationales, ImageNetSegmentation, lambda path: BoxedImages(path, path)])
def test_a_folder_in_place_of_a_file_is_named_as_one(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"{tmp_path} is no file"):
        reader(tmp_path)
    with pytest.raises(DatasetError, match="lost does not exist"):
        reader(tmp_path / "lost")


def test_joined_readers_follow_each_other(tmp_path: Path) -> None:
    for name, colour in (("one", (1, 1, 1)), ("two", (2, 2, 2))):
        picture(tmp_path / name / "a.png", colour)
        (tmp_path / name / "labels.json").write_text('{"a.png": {"class_index": 0}, "lost.png": {"class_index": 1}}')
    reader = Joined(LabelledImages(tmp_path / "one"), LabelledImages(tmp_path / "two"))
    assert len(reader) == 4
    assert reader.source == (str(tmp_path / "one"), str(tmp_path / "two")) and not reader.has_regions
    assert [e.image[0, 0, 0] for e in reader] == [1, 2]
    assert [s.index for s in reader.skipped] == [1, 3]


class TestImageNet:
    WNIDS = ("n01440764", "n01443537", "n01484850")

    def devkit(self, path: Path, truth: list[int]) -> Path:
        from scipy.io import savemat

        # Numbers are not in the order of the WordNet ids, and an inner synset comes last, as in the original.
        rows = [(1, "n01484850", 0), (2, "n01440764", 0), (3, "n01443537", 0), (4, "n00001740", 3)]
        synsets = np.zeros((len(rows), 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
        for i, (number, wnid, children) in enumerate(rows):
            synsets[i, 0] = (float(number), wnid, float(children))
        (path / "data").mkdir(parents=True)
        savemat(path / "data" / "meta.mat", {"synsets": synsets})
        lines = "".join(f"{number}\n" for number in truth)
        (path / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
        return path

    def test_official_layout_with_devkit_and_boxes(self, tmp_path: Path) -> None:
        devkit = self.devkit(tmp_path / "devkit", [3, 1, 2])
        for number in (1, 2, 3):
            picture(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
        boxes = tmp_path / "bbox"
        boxes.mkdir()
        objects = "".join(
            f"<object><name>{wnid}</name><bndbox><xmin>1</xmin><ymin>0</ymin><xmax>3</xmax><ymax>2</ymax></bndbox></object>"
            for wnid in ("n01484850", "n99999999")
        )
        (boxes / "ILSVRC2012_val_00000002.xml").write_text(f"<annotation>{objects}</annotation>")
        (boxes / "ILSVRC2012_val_00000003.xml").write_text("<annotation><object>")
        reader = ImageNetValidation(tmp_path / "val", devkit=devkit, boxes=boxes)
        assert len(reader) == 3
        assert reader.wnids == sorted(self.WNIDS)
        example = reader[1]  # its ground truth is number 1, n01484850, the third class
        assert (example.name, example.label) == ("ILSVRC2012_val_00000002.JPEG", 2)
        assert [(r.label, r.name) for r in example.regions] == [(2, "n01484850"), (None, "n99999999")]
        assert example.mask(2).sum() == 4
        assert [e.name for e in reader] == ["ILSVRC2012_val_00000002.JPEG"]
        assert "00000001.xml does not exist" in reader.skipped[0].reason
        assert "00000003.xml is not a readable box annotation" in reader.skipped[1].reason
        plain = ImageNetValidation(tmp_path / "val", devkit=devkit)
        assert [e.label for e in plain] == [1, 2, 0]

    def test_class_folders(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        picture(tmp_path / "n01443537" / "ILSVRC2012_val_00000009.JPEG")
        picture(tmp_path / "n15075141" / "x.png")
        reader = ImageNetValidation(tmp_path)
        assert [e.label for e in reader] == [1, 999]
        chosen = ImageNetValidation(tmp_path, wnids=["n15075141", "n01443537"])
        assert [e.label for e in chosen] == [1, 0]

    def test_bad_folders(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="neither"):
            ImageNetValidation(tmp_path)
        picture(tmp_path / "folders" / "n01443537" / "x.png")
        with pytest.raises(DatasetError, match="n01443537 is not among the 1 classes"):
            ImageNetValidation(tmp_path / "folders", wnids=["n15075141"])
        picture(tmp_path / "flat" / "ILSVRC2012_val_00000007.JPEG")
        with pytest.raises(DatasetError, match="give devkit"):
            ImageNetValidation(tmp_path / "flat")
        with pytest.raises(DatasetError, match="meta.mat does not exist"):
            ImageNetValidation(tmp_path / "flat", devkit=tmp_path)
        devkit = self.devkit(tmp_path / "devkit", [3, 1])
        with pytest.raises(DatasetError, match="ground truth .* has 2 lines"):
            ImageNetValidation(tmp_path / "flat", devkit=devkit)
        (devkit / "data" / "meta.mat").write_bytes(b"damaged")
        with pytest.raises(DatasetError, match="cannot be read as an ILSVRC2012 devkit"):
            ImageNetValidation(tmp_path / "flat", devkit=devkit)


class TestImageNetSegmentation:
    def file(self, path: Path) -> Path:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            references = h5py.special_dtype(ref=h5py.Reference)
            images = file.create_dataset("value/img", (2, 1), dtype=references)
            masks = file.create_dataset("value/gt", (2, 1), dtype=references)
            for i, size in enumerate([(4, 6), (5, 3)]):
                image = np.zeros((*size, 3), dtype=np.uint8)
                image[0, 1] = (1, 2, 3)
                mask = np.zeros(size, dtype=np.uint8)
                mask[-1, 0] = 1
                stored = mask.T if i == 0 else mask.T[:, :-1]  # the second does not fit its image
                images[i, 0] = file.create_dataset(f"refs/i{i}", data=image.transpose(2, 1, 0)).ref
                inner = file.create_dataset(f"refs/m{i}", data=stored).ref
                cell = file.create_dataset(f"refs/c{i}", (1, 1), dtype=references)
                cell[0, 0] = inner
                masks[i, 0] = cell.ref
        return path

    def test_official_format(self, tmp_path: Path) -> None:
        reader = ImageNetSegmentation(self.file(tmp_path / "gtsegs_ijcv.mat"))
        assert len(reader) == 2
        (example,) = list(reader)
        assert example.image.shape == (4, 6, 3)
        assert example.image[0, 1].tolist() == [1, 2, 3]
        assert np.argwhere(example.mask()).tolist() == [[3, 0]]
        assert "image 1 of" in reader.skipped[0].reason
        assert "does not fit mask" in reader.skipped[0].reason

    def test_bad_files(self, tmp_path: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with pytest.raises(DatasetError, match="does not exist"):
            ImageNetSegmentation(tmp_path / "gtsegs_ijcv.mat")
        (tmp_path / "no.mat").write_bytes(b"not hdf5")
        with pytest.raises(DatasetError, match="not a readable gtsegs_ijcv.mat"):
            ImageNetSegmentation(tmp_path / "no.mat")
        with h5py.File(tmp_path / "other.mat", "w") as file:
            file["value/img"] = [1]
        with pytest.raises(DatasetError, match="not a readable gtsegs_ijcv.mat"):
            ImageNetSegmentation(tmp_path / "other.mat")


class TestCoco:
    def folder(self, path: Path) -> Path:
        pytest.importorskip("pycocotools")
        picture(path / "val2017" / "000000000139.jpg", size=(8, 6))
        picture(path / "val2017" / "000000000285.jpg", size=(8, 5))
        square = [1, 1, 5, 1, 5, 4, 1, 4]
        instances = {
            "images": [
                {"id": 285, "file_name": "000000000285.jpg", "width": 8, "height": 6},
                {"id": 139, "file_name": "000000000139.jpg", "width": 8, "height": 6},
                {"id": 632, "file_name": "000000000632.jpg", "width": 8, "height": 6},
            ],
            "annotations": [
                {"id": 1, "image_id": 139, "category_id": 17, "bbox": [1, 1, 4, 3], "segmentation": [square]}
                | {"iscrowd": 0, "area": 12},
                {"id": 2, "image_id": 139, "category_id": 18, "bbox": [0, 0, 1, 2], "iscrowd": 1, "area": 2}
                | {"segmentation": {"size": [6, 8], "counts": [0, 2, 46]}},
            ],
            "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        }
        (path / "instances_val2017.json").write_text(json.dumps(instances))
        return path

    def test_official_format(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = self.folder(tmp_path)
        reader = CocoInstances(folder / "val2017", folder / "instances_val2017.json")
        (example,) = list(reader)
        assert example.name == "000000000139.jpg"
        (cat,) = example.regions
        assert (cat.label, cat.name, cat.box) == (17, "cat", (1, 1, 5, 4))
        wanted = np.zeros((6, 8), dtype=bool)
        wanted[1:4, 1:5] = True
        assert (cat.mask == wanted).all()
        assert "285.jpg is not of the annotated size 8x6" in reader.skipped[0].reason
        assert "632.jpg does not exist" in reader.skipped[1].reason
        crowds = CocoInstances(folder / "val2017", folder / "instances_val2017.json", crowds=True)[0]
        # Run-length counts go down the columns: the first two pixels of the first one.
        assert np.argwhere(crowds.mask(18)).tolist() == [[0, 0], [1, 0]]
        assert capsys.readouterr().out == ""

    def test_bad_files(self, tmp_path: Path) -> None:
        pytest.importorskip("pycocotools")
        with pytest.raises(DatasetError, match="instances.json does not exist"):
            CocoInstances(tmp_path, tmp_path / "instances.json")
        (tmp_path / "instances.json").write_text('{"images": []}')
        with pytest.raises(DatasetError, match="not a readable COCO instance file"):
            CocoInstances(tmp_path, tmp_path / "instances.json")
        for change in ({"file_name": 3}, {"height": None}):
            image = {"id": 1, "file_name": "a.png", "width": 6, "height": 4, **change}
            (tmp_path / "instances.json").write_text(json.dumps({"images": [image], "annotations": []}))
            with pytest.raises(DatasetError, match="not a readable COCO instance file"):
                CocoInstances(tmp_path, tmp_path / "instances.json")

    def test_damaged_annotations_are_named(self, tmp_path: Path) -> None:
        pytest.importorskip("pycocotools")
        picture(tmp_path / "a.png")
        image = {"id": 1, "file_name": "a.png", "width": 6, "height": 4}
        outline = {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]], "iscrowd": 0}
        for change in ({}, {"bbox": 5}, {"bbox": [0, 0, "a", 4]}):
            content = {"images": [image], "annotations": [{**outline, **change}], "categories": []}
            (tmp_path / "instances.json").write_text(json.dumps(content))
            with pytest.raises(DatasetError, match="annotation 7 of a.png cannot be decoded"):
                CocoInstances(tmp_path, tmp_path / "instances.json")[0]


class TestEraser:
    ROWS = (
        {
            "annotation_id": "negR_1.txt",
            "classification": "NEG",
            "query": "What is the sentiment of this review?",
            "evidences": [
                [{"docid": "negR_1.txt", "start_token": 2, "end_token": 4, "text": "dreadfully dull"}],
                [{"docid": "negR_1.txt", "start_token": 5, "end_token": 5, "text": ""}],
            ],
        },
        {
            "annotation_id": "posR_2.txt",
            "classification": "POS",
            "evidences": [[{"docid": "posR_2.txt", "start_token": 0, "end_token": 1, "text": "great"}]],
        },
        {"annotation_id": "lost.txt", "classification": "POS", "evidences": []},
        {"annotation_id": "negR_1.txt", "classification": "POS"},
    )

    def folder(self, path: Path) -> Path:
        (path / "docs").mkdir(parents=True)
        (path / "docs" / "negR_1.txt").write_text("this is dreadfully\ndull stuff . ")
        (path / "docs" / "posR_2.txt").write_text("a great film")
        (path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        return path

    def test_official_format(self, tmp_path: Path) -> None:
        reader = Eraser(self.folder(tmp_path / "movies"), "val")
        assert len(reader) == 4
        (example,) = list(reader)
        assert example.words == ("this", "is", "dreadfully", "dull", "stuff", ".")
        assert (example.name, example.label) == ("negR_1.txt", "NEG")
        assert example.query == "What is the sentiment of this review?"
        assert example.rationale.astype(int).tolist() == [0, 0, 1, 1, 0, 0]
        reasons = [s.reason for s in reader.skipped]
        assert "line 2" in reasons[0] and "'great' does not stand at its place in posR_2.txt" in reasons[0]
        assert "line 3" in reasons[1] and "lost.txt does not exist" in reasons[1]
        assert "line 4" in reasons[2] and "evidences" in reasons[2]

    def test_archive_and_documents_in_one_file(self, tmp_path: Path) -> None:
        row = {"annotation_id": "q1", "classification": "SUPPORTS", "query": "?"}
        spans = [
            {"docid": "b", "start_token": 1, "end_token": 2, "text": "five"},
            {"docid": "a", "start_token": 0, "end_token": 1, "text": "one"},
        ]
        folder = tmp_path / "fever"
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps({**row, "evidences": [spans]}))
        documents = [{"docid": "a", "document": "one two three"}, {"docid": "b", "document": "four five"}]
        (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
        with tarfile.open(tmp_path / "fever.tar.gz", "w:gz") as archive:
            archive.add(folder, "data/fever")
        (example,) = list(Eraser(tmp_path / "fever.tar.gz", "train"))
        assert example.words == ("one", "two", "three", "four", "five")
        assert example.rationale.astype(int).tolist() == [1, 0, 0, 0, 1]

    def test_bad_folders(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="test.jsonl"):
            Eraser(self.folder(tmp_path / "movies"), "test")
        (tmp_path / "movies" / "test.jsonl").write_text('{"a": 1}\n{oops')
        with pytest.raises(DatasetError, match="line 2 of .*test.jsonl is not valid JSON"):
            Eraser(tmp_path / "movies", "test")
        (tmp_path / "lonely").mkdir()
        (tmp_path / "lonely" / "test.jsonl").write_text('{"a": 1}')
        with pytest.raises(DatasetError, match="neither docs/ nor docs.jsonl"):
            Eraser(tmp_path / "lonely", "test")
        (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
        with pytest.raises(DatasetError, match="broken.tar.gz is not a readable zip or tar archive"):
            Eraser(tmp_path / "broken.tar.gz")


class TestTinyImageNet:
    def folder(self, path: Path) -> Path:
        picture(path / "val" / "images" / "val_0.JPEG", size=(64, 64))
        (path / "val" / "val_annotations.txt").write_text(
            "val_0.JPEG\tn01443537\t0\t32\t44\t62\nval_1.JPEG\tn15075141\t1\t2\t3\t4\n"
        )
        return path

    def test_official_format(self, tmp_path: Path) -> None:
        reader = TinyImageNetValidation(self.folder(tmp_path), wnids=["n15075141", "n01443537"])
        (example,) = list(reader)
        assert (example.name, example.label) == ("val_0.JPEG", 1)
        assert example.regions[0].box == (0, 32, 45, 63)
        assert example.mask().sum() == 45 * 31
        assert "val_1.JPEG does not exist" in reader.skipped[0].reason

    def test_archive_and_imagenet_order(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        with tarfile.open(tmp_path / "val.tar.gz", "w:gz") as archive:
            archive.add(self.folder(tmp_path / "tiny"), "tiny-imagenet-200")
        assert TinyImageNetValidation(tmp_path / "val.tar.gz")[0].label == 1

    def test_bad_line_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t32\n")
        with pytest.raises(DatasetError, match="line 1 of .*val_annotations.txt"):
            TinyImageNetValidation(tmp_path, wnids=[])


class TestBoxedImages:
    def test_format_and_damage(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.JPEG", size=(8, 8))
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.write(tmp_path / "a.JPEG", "a.JPEG")
        entries = [{"file": "a.JPEG", "label": 1, "box": [0, 0, 7, 3]}, {"file": "b.JPEG", "label": 0, "box": [0] * 4}]
        index = {"classes": [{"name": "cat"}, {"name": "dog"}], "images": entries}
        (tmp_path / "validation.json").write_text(json.dumps(index))
        reader = BoxedImages(tmp_path / "images.zip", tmp_path / "validation.json")
        (example,) = list(reader)
        assert (example.label, example.regions[0].name) == (1, "dog")
        assert example.mask().sum() == 32
        assert "b.JPEG does not exist" in reader.skipped[0].reason
        index["images"][0]["label"] = 7
        (tmp_path / "validation.json").write_text(json.dumps(index))
        with pytest.raises(DatasetError, match="does not list classes"):
            BoxedImages(tmp_path / "images.zip", tmp_path / "validation.json")


class TestSst:
    def test_development_set_in_both_headers(self, tmp_path: Path) -> None:
        (tmp_path / "glue.tsv").write_text('sentence\tlabel\nso " good\t1\n')
        (tmp_path / "dev.tsv").write_text("label\tcontent\n0\tso bad .\n")
        glue, local = Sst2(tmp_path / "glue.tsv")[0], Sst2(tmp_path / "dev.tsv")[0]
        assert (glue.words, glue.label) == (("so", '"', "good"), "1")
        assert (local.words, local.label) == (("so", "bad", "."), "0")

    def test_lines_end_at_line_feeds_alone(self, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_bytes("label\tsentence\r\n1\tso\u2028very\rgood\r\n".encode())
        (only,) = Sst2(tmp_path / "dev.tsv")
        assert only.words == ("so", "very", "good")
        row = {"sentence": "so\x85very\u2028good", "gold_label": "1", "annotations": []}
        (tmp_path / "sst.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        (only,) = SstRationales(tmp_path / "sst.jsonl")
        assert only.words == ("so", "very", "good")

    def test_bad_lines(self, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text("label\tsentence\n0\tfine\npositive\tno\n")
        with pytest.raises(DatasetError, match="line 3 of"):
            Sst2(tmp_path / "dev.tsv")
        (tmp_path / "dev.tsv").write_text("0\tfine\n")
        with pytest.raises(DatasetError, match="first line of"):
            Sst2(tmp_path / "dev.tsv")
        (tmp_path / "dev.tsv").write_bytes(b"label\tsentence\n0\t\xff\xfe\n")
        with pytest.raises(DatasetError, match="not UTF-8"):
            Sst2(tmp_path / "dev.tsv")

    def test_rationales_by_hand(self, tmp_path: Path) -> None:
        annotations = [
            {"label": "positive", "rationale": [0, 1, 1]},
            {"label": "positive", "rationale": [0, 0, 1]},
            {"label": "negative", "rationale": [1, 1, 1]},
        ]
        row = {"sentence": "a good film", "gold_label": "positive", "annotations": annotations}
        broken = {**row, "annotations": [{"label": "positive", "rationale": [1]}]}
        unread = {**row, "annotations": annotations[2:]}
        path = tmp_path / "sst.jsonl"
        path.write_text("\n".join(map(json.dumps, [row, broken, unread])))
        reader = SstRationales(path)
        first, second = list(reader)
        # Half of the two who agree with the gold label marked "good", both marked "film"; the third does not count.
        assert first.rationale.astype(int).tolist() == [0, 1, 1]
        assert not second.rationale.any()
        assert SstRationales(path, agreement=0.6)[0].rationale.astype(int).tolist() == [0, 0, 1]
        assert "line 2 of" in reader.skipped[0].reason and "as long as" in reader.skipped[0].reason


class TestEasyVqa:
    def test_official_format(self, tmp_path: Path) -> None:
        root = tmp_path / "easy_vqa" / "data"
        image = np.full((16, 16, 3), 240, dtype=np.uint8)
        image[3:6, 8:12] = (255, 0, 0)
        picture(root / "test" / "images" / "0.png")
        Image.fromarray(image).save(root / "test" / "images" / "0.png")
        (root / "answers.txt").write_text("red\nyes\n")
        questions = [["what color is the shape?", "red", 0], ["is there a red shape?", "yes", 1]]
        (root / "test" / "questions.json").write_text(json.dumps(questions))
        reader = EasyVqa(tmp_path)
        (example,) = list(reader)
        assert (example.question, example.answer) == ("what color is the shape?", "red")
        wanted = np.zeros((16, 16), dtype=bool)
        wanted[3:6, 8:12] = True
        assert (example.mask == wanted).all()
        assert reader.answers == ["red", "yes"]
        assert "1.png does not exist" in reader.skipped[0].reason
        (root / "test" / "questions.json").write_text("[1]")
        with pytest.raises(DatasetError, match="not a list of question, answer"):
            EasyVqa(tmp_path)

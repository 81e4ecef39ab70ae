"""Published scores for Tables 1 to 4, in percent, each with where it was read.

`checked` says that the number was read in the method's own paper, repository or log; others are quoted as the source
prints them. Where the paper's own tables and a peer's own source disagree, the note says so.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A row: scores of folds 0 to 3, if they are known, and the mean, 1-shot and 5-shot."""

    table: int
    method: str
    encoder: str
    one: tuple[float, ...]
    """Four folds and their mean, or the mean alone; of Table 3 FSS-1000's mIoU and DAVIS-17's J&F (nan: unknown); of
    Table 4 mIoU and FB-IoU."""
    five: tuple[float, ...]
    source: str
    checked: bool
    note: str = ""


NAN = float("nan")
PAPER = "FS-DINO (arXiv 2504.15669)"
GF_SAM = "GF-SAM (arXiv 2410.06964)"
SANSA = "SANSA (arXiv 2505.21795v2)"
FORIS = "FoRIS (arXiv 2609.03384)"

ROWS = (
    Published(1, "BAM", "ResNet50", (69.0, 73.6, 67.6, 61.1, 67.8), (70.6, 75.1, 70.8, 67.2, 70.9), f"{PAPER}, Table 1",
              True, "means 67.81 and 70.91 in its repository's README (c0f935c)"),
    Published(1, "HDMNet", "ResNet50", (71.0, 75.4, 68.9, 62.1, 69.4), (71.3, 76.2, 71.3, 68.5, 71.8),
              f"{PAPER}, Table 1", False),
    Published(1, "AENet", "ResNet50", (71.3, 75.9, 68.6, 65.4, 70.3), (73.9, 77.8, 73.3, 72.0, 74.2),
              f"{PAPER}, Table 1", False),
    Published(1, "MSI", "ResNet101", (73.1, 73.9, 64.7, 68.8, 70.1), (73.6, 76.1, 68.0, 71.3, 72.2),
              f"{PAPER}, Table 1", False),
    Published(1, "SCCAN", "ResNet101", (70.9, 73.9, 66.8, 61.7, 68.3), (73.1, 76.4, 70.3, 66.1, 71.5),
              "SCCAN's repository (c4e7b40), Table 1", True,
              "with HSNet's resizing; with PFENet's 67.7 and 70.7: the resizing alone moves 0.6"),
    Published(1, "ABCB", "ResNet101", (73.0, 76.0, 69.7, 69.2, 72.0), (74.8, 78.5, 73.6, 72.6, 74.9),
              f"{PAPER}, Table 1", False),
    Published(1, "HMNet", "ResNet50", (72.2, 75.4, 70.0, 63.9, 70.4), (74.2, 77.3, 74.1, 70.9, 74.1),
              "HMNet (NeurIPS 2024), Table 1", True),
    Published(1, "Matcher", "DINOv2-L, SAM-H", (67.7, 70.7, 66.9, 67.0, 68.1), (71.4, 77.5, 74.1, 72.8, 74.0),
              f"{GF_SAM}, Table 9", False, "as run by GF-SAM's authors"),
    Published(1, "GF-SAM", "DINOv2-L, SAM-H", (71.1, 75.7, 69.2, 73.3, 72.1), (81.5, 86.3, 79.7, 82.9, 82.6),
              f"{GF_SAM}, Table 9", True, "the 1-shot folds average 72.3, as printed there too"),
    Published(1, "VRP-SAM", "ResNet50, SAM-H", (73.9, 78.3, 70.6, 65.0, 71.9), (), f"{PAPER}, Table 1", False),
    Published(1, "FCP", "ResNet50, SAM-H", (74.9, 77.4, 71.8, 68.8, 73.2), (77.2, 78.8, 72.2, 67.7, 74.0),
              f"{PAPER}, Table 1", False),
    Published(1, "SANSA", "SAM2-L", (78.1, 80.0, 68.3, 66.1, 73.1), (), f"{SANSA}, Table 10", True),
    Published(1, "FS-DINO", "DINOv2-B", (75.6, 80.3, 72.2, 73.4, 75.4), (78.1, 83.1, 73.6, 76.3, 77.8),
              f"{PAPER}, Table 1", True),
    Published(1, "UINO-FSS (v4 of FS-DINO)", "DINOv2-B", (80.6,), (), "scholarfeed.org, 2504.15669v4", False,
              "read at second hand"),
    Published(2, "BAM", "ResNet50", (43.4, 50.6, 47.5, 43.4, 46.2), (49.3, 54.2, 51.6, 49.6, 51.2), f"{PAPER}, Table 2",
              True, "means 46.23 and 51.16 in its repository's README (c0f935c)"),
    Published(2, "HDMNet", "ResNet50", (43.8, 55.3, 51.6, 49.4, 50.0), (50.6, 61.6, 55.7, 56.0, 56.0),
              f"{PAPER}, Table 2", True, "means in its repository's README (39ec8b2)"),
    Published(2, "AENet", "ResNet50", (45.4, 57.1, 52.6, 50.0, 51.3), (52.7, 62.6, 56.8, 56.1, 57.1),
              f"{PAPER}, Table 2", False),
    Published(2, "MSI", "ResNet101", (44.8, 54.2, 52.3, 48.0, 49.8), (49.3, 58.0, 56.1, 52.7, 54.0),
              f"{PAPER}, Table 2", False),
    Published(2, "SCCAN", "ResNet101", (42.6, 51.4, 50.0, 48.8, 48.2), (49.4, 61.7, 61.9, 55.0, 57.0),
              "SCCAN's repository (c4e7b40), Table 2", True, "with HSNet's resizing; with PFENet's 47.0 and 55.1"),
    Published(2, "ABCB", "ResNet101", (46.0, 56.3, 54.3, 51.3, 51.5), (51.6, 63.5, 62.8, 57.2, 58.8),
              f"{PAPER}, Table 2", False, "the 1-shot folds average 52.0"),
    Published(2, "HMNet", "ResNet50", (45.5, 58.7, 52.9, 51.4, 52.1), (53.4, 64.6, 60.8, 56.8, 58.9),
              "HMNet (NeurIPS 2024), Table 2", True),
    Published(2, "Matcher", "DINOv2-L, SAM-H", (52.7, 53.5, 52.6, 52.1, 52.7), (60.1, 62.7, 60.9, 59.2, 60.7),
              "Matcher's repository (d59b6c7), logs", True, "1,000 episodes a fold"),
    Published(2, "GF-SAM", "DINOv2-L, SAM-H", (56.6, 61.4, 59.6, 57.1, 58.7), (67.1, 69.4, 66.0, 64.8, 66.8),
              f"{GF_SAM}, Table 10", True),
    Published(2, "FCP", "ResNet50, SAM-H", (46.4, 56.4, 55.3, 51.8, 52.5), (52.6, 63.3, 59.8, 56.1, 58.0),
              f"{PAPER}, Table 2", False),
    Published(2, "VRP-SAM", "DINOv2-B, SAM-H", (56.8, 61.0, 64.2, 59.7, 60.4), (), f"{PAPER}, Table 2", False),
    Published(2, "SegIC", "DINOv2-B", (55.8, 54.7, 52.4, 51.4, 53.6), (), f"{PAPER}, Table 2", False,
              "SANSA prints the same mean with DINOv2-G"),
    Published(2, "SANSA", "SAM2-L", (57.7, 61.7, 62.8, 58.5, 60.2), (64.3,),
              f"SANSA's repository (3377265), README; {SANSA}, Table 1", True),
    Published(2, "FoRIS", "DINOv3-L", (60.9,), (68.4,), f"{FORIS}, Tables 1 and 8", True),
    Published(2, "INSID3", "DINOv3-L", (57.6,), (65.1,), f"{FORIS}, Tables 1 and 8", False,
              "another re-run prints 57.35"),
    Published(2, "FS-DINO", "DINOv2-B", (58.6, 66.0, 62.3, 62.6, 62.4), (62.1, 70.2, 66.1, 63.0, 65.4),
              f"{PAPER}, Table 2", True),
    Published(2, "UINO-FSS (v4 of FS-DINO)", "DINOv2-B", (62.2, 66.0, 65.5, 64.4, 64.5), (),
              "github.com/misaya-yang/cv_reasearch, ladder.md", False, "read at second hand"),
    Published(3, "Painter", "ViT-L", (61.7, 34.6), (), "SegGPT (arXiv 2304.03284), Tables 2 and 3", False),
    Published(3, "SegGPT", "ViT-L", (85.6, 75.6), (), "SegGPT (arXiv 2304.03284), Tables 2 and 3", True,
              f"8 frames on DAVIS-17 (70.0 with one); {PAPER} prints 50.0"),
    Published(3, "PerSAM", "SAM-H", (71.2, 60.3), (), f"{PAPER}, Table 3", False),
    Published(3, "PerSAM-F", "SAM-H", (75.6, 71.9), (), f"{PAPER}, Table 3", False, "SINE quotes 76.1 on DAVIS-17"),
    Published(3, "Matcher", "DINOv2-L, SAM-H", (87.1, NAN), (), "Matcher's repository (d59b6c7), logs", True,
              f"{PAPER} prints 33.0, which is Matcher's score on LVIS-92i, and 79.5 on DAVIS-17"),
    Published(3, "GF-SAM", "DINOv2-L, SAM-H", (88.0, NAN), (), f"{GF_SAM}, Table 1 and logs", True),
    Published(3, "SegIC", "ViT-L", (86.8, 71.4), (), f"{PAPER}, Table 3", False),
    Published(3, "SANSA", "SAM2-L", (91.4, NAN), (), f"{SANSA}, Table 1", True, "trained on classes of FSS-1000"),
    Published(3, "SINE", "DINOv2-L", (NAN, 77.0), (), "SINE (arXiv 2410.04842), Table 4", True, "6 to 8 frames"),
    Published(3, "FS-DINO", "DINOv2-B", (87.2, 76.6), (), f"{PAPER}, Table 3", True),
    Published(4, "FS-DINO, BA+PCS", "DINOv2-B", (58.2, 77.2), (), f"{PAPER}, Table 4", True),
    Published(4, "FS-DINO, BA+SVP+PCS", "DINOv2-B", (59.6, 77.3), (), f"{PAPER}, Table 4", True),
    Published(4, "FS-DINO, BA+SVP+PCS+4D", "DINOv2-B", (62.4, 79.0), (), f"{PAPER}, Table 4", True),
)  # fmt: skip
BENCHMARKS = {1: "PASCAL-5i", 2: "COCO-20i", 3: "FSS-1000 and DAVIS-17, 1-shot", 4: "Ablation, COCO-20i, 1-shot"}
ABSENT = (
    Published(0, "INSID3", "DINOv3-L", (85.0,), (), "github.com/misaya-yang/cv_reasearch, ladder.md", False,
              "share of rightly empty masks, of its supplement, read at second hand"),
    Published(0, "HSNet", "ResNet50", (83.7,), (), "iFSL's repository, fs-cs/README.md", True,
              "0/1 exact ratio of classification on PASCAL-5i, where queries may lack the class"),
    Published(0, "ASNet", "ResNet50", (84.9,), (), "iFSL's repository, fs-cs/README.md", True,
              "as HSNet's"),
)  # fmt: skip
"""On queries that do not show the class: measures differ, so these are no more than neighbours of ours."""

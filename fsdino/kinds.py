"""The kinds of data sets, by the names that flags have for them."""

from typing import Literal

Kind = Literal["voc", "coco2014", "coco2017", "fss1000", "davis2016", "davis2017", "folder"]
"""Which data set a folder holds, where its layout does not tell."""

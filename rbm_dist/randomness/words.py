"""What random keys are for: a word for each use keeps its bits apart from those of all others."""

from enum import IntEnum, unique


@unique
class Word(IntEnum):
    """The second word of a key, after the seed."""

    TEACHER_TRAINING = 1
    TEACHER_VALIDATION = 2
    SOFT_LABELS = 3
    KMEANS_ROWS = 5
    STUDENT_DROPOUT = 6
    LATENCY = 7
    SOFT_LABEL_NOISE = 8
    KRD_PAIRS = 9
    TRIAL = 10
    SOFT_LABEL_HOT_ROWS = 11
    REGRESSION_ROWS = 12
    KMEANS_SAMPLE = 13
    KMEANS_START = 14
    TEACHER_HOT_ROWS = 15
    UPDATE_REPLAY = 16
    PROJECTION = 0xE0
    LABEL_FOLD = 0xE1
    WALK_ORDER = 0xE2
    WALK = 0xE3
    WALK_VECTORS = 0xE4
    INSPECTED_ROWS = 0x3A9
    REGION = 0x4E61
    REGION_RULES = 0x4E62
    REGION_ROWS = 0x4E63
    REGION_EDGES = 0x4E64
    SYNTHETIC_PERMUTATION = 0x5A01
    SYNTHETIC_CENTRES = 0x5A02
    SYNTHETIC_NODES = 0x5A03
    SYNTHETIC_NOISE = 0x5A04
    SYNTHETIC_EDGES = 0x5A05
    SPLIT = 0x5B117

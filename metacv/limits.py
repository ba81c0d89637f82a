"""Limits of files that others may have made. A file beyond one is refused before it is inflated, allocated or followed.

Each lies far above what metacv and the published data sets need, and low enough for a laptop.
"""

TEXT = 10**7  # bytes of a JSON, YAML or text file: a log of 100,000 lines has about as many
LIST = 2**26  # bytes of a CSV list: that of tieredImageNet, the longest, has 20 MB

GROWTH, SMALL = 20, 10**8  # an archive may unpack to GROWTH times its size + SMALL bytes: images hardly shrink

PICKLE = 2**22  # bytes of the pickle in a checkpoint or a cache: its tensors lie beside it, and ResNet-12's has 20 kB
STEPS = 3 * 10**7  # of reading one pickle, at most 100 bytes of memory each: tieredImageNet's needs up to 15 million

# Values written out, with ten letters as one value. A value may be in a file once and in its lists many times.
VALUES = 10**6  # in a checkpoint or a cache, without its tensors: the names of 100,000 classes
SETTINGS = 5000  # among the settings of a checkpoint: there are about 200
RESULT = 10**5  # in a result file: a result has about 100
WORDS = 4000  # in what one command line changed, which Hydra parses in a few seconds: there are fewer settings
DEPTH = 50  # of lists in lists

SETTING = 10**6  # a whole number among those that evaluation uses, but for seeds: episodes are the largest, 10,000
IMAGE = 2**26  # numbers in an image: 4096x4096 pixels in colour
CLASSES = 10**4  # of examples that `predict save=` keeps: every image gets a probability for each
NAME = 1000  # letters of a class name that a kept model holds: numpy gives all names the room of the longest

EVENTS = 2**28  # bytes of TensorBoard's files in a run's folder: a run of the papers writes up to 30 MB
PICTURE = 2**23  # bytes of a picture in them, which a report's page holds: an episode has 200 kB

"""Limits for untrusted files. A file above a limit is rejected before it is decompressed, loaded or followed.

Each limit is far above what metacv and the published data sets need, and low enough for a laptop.
"""

TEXT = 10**7  # bytes of a JSON, YAML or text file: about a log of 100,000 lines
LIST = 2**26  # bytes of a CSV list: that of tieredImageNet, the longest, has 20 MB

WEIGHTS = 2**34  # bytes of a file with pre-trained weights: a network of 4 billion numbers

GROWTH, SMALL = 20, 10**8  # an archive may unpack to GROWTH times its size + SMALL bytes: images hardly shrink

PICKLE = 2**22  # bytes of the pickle in a checkpoint or a cache, without tensors: that of ResNet-12 has 20 kB
STEPS = 3 * 10**7  # opcodes of one pickle, each at most 100 bytes of memory: tieredImageNet has up to 15 million

# Number of values when written out; ten letters count as one. References may repeat a value of a small file many times.
VALUES = 10**6  # in a checkpoint or a cache, without its tensors: the names of 100,000 classes
SETTINGS = 5000  # among the settings of a checkpoint: there are about 200
RESULT = 10**5  # in a result file: a result has about 100
WORDS = 4000  # in the overrides of one command line: Hydra parses so many in seconds, and there are fewer settings
DEPTH = 50  # of lists in lists

SETTING = 10**6  # an integer setting of evaluation, except seeds: the largest in use is episodes, 10,000
IMAGE = 2**26  # numbers in an image: 4096x4096 pixels in colour
CLASSES = 10**4  # in the support set that `predict save=` keeps: every image gets a probability for each class
NAME = 1000  # letters of a class name in a kept model: a numpy array of names has the width of the longest

HARDWARE = 1000  # letters of the names of the hardware that a run was trained on

EVENTS = 2**28  # bytes of TensorBoard's files in a run's folder: the papers' runs write up to 30 MB
PICTURE = 2**23  # bytes of an episode's picture in these files, which a report includes: usually 200 kB

"""Settings far from those of the method's own experiments, which are often a slip."""

from collections.abc import Iterator

from omegaconf import OmegaConf

from metacv import CONFIG_DIR
from metacv.config import TrainConfig

FAR = 10  # times as large, or as small


def unusual(config: TrainConfig) -> Iterator[str]:
    """A sentence for each rate or batch that is FAR from every value of it in the method's files in configs/."""
    target = f"_target_: {config.algo['_target_']}\n"
    methods = {path for path in (CONFIG_DIR / "algo").glob("*.yaml") if target in path.read_text("utf-8")}
    chosen = [f"override /algo: {path.stem}\n" for path in methods]
    experiments = (CONFIG_DIR / "experiment").rglob("*.yaml")
    own = {path for path in experiments if any(choice in path.read_text("utf-8") for choice in chosen)}
    files = [OmegaConf.load(path) for path in methods | own]
    for name, value in (("algo.inner_lr", config.algo.get("inner_lr")), ("meta_batch", config.meta_batch)):
        found = (OmegaConf.select(file, name) for file in files)
        usual = sorted({number for number in found if isinstance(number, int | float)})
        if usual and isinstance(value, int | float) and not usual[0] / FAR < value < usual[-1] * FAR:
            several = f"{usual[0]:g} to {usual[-1]:g}" if len(usual) > 1 else f"{usual[0]:g}"
            yield f"{name}={value:g} is far from {several}, which this method's files in configs/ have"

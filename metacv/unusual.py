"""Find settings far from those of the method's own experiments, which are often mistakes."""

from collections.abc import Iterator

from omegaconf import OmegaConf

from metacv import CONFIG_DIR
from metacv.config import TrainConfig

FAR = 10  # factor above or below the usual values


def unusual(config: TrainConfig) -> Iterator[str]:
    """Yield a sentence for inner_lr or meta_batch if it is FAR from every value in the method's files in configs/."""
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
            yield f"{name}={value:g} is far from {several}, the values for this method in configs/"

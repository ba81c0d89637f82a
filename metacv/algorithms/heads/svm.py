"""scikit-learn's linear support vector machine, fitted to the support set."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metacv.algorithms.heads.base import Head
from metacv.bounds import Copies, Positive
from metacv.data.task import TaskBatch


class SVM(Head):
    """One-vs-rest LinearSVC on unit features; logits are the decision function."""

    def __init__(self, C: Positive = 1.0, augment: Copies = 0, flip: bool = False) -> None:
        super().__init__(augment, flip)
        self.C = C

    def forward(self, tasks: TaskBatch) -> Tensor:
        from sklearn.svm import LinearSVC  # takes a second to import

        tasks = tasks.map(lambda features: F.normalize(features, dim=-1).cpu())
        logits = []
        for support, labels, query in zip(tasks.support_x, tasks.support_y.cpu(), tasks.query_x, strict=True):
            machine = LinearSVC(C=self.C, dual=True, random_state=0, max_iter=10_000).fit(support, labels)
            values = torch.from_numpy(machine.decision_function(query))
            logits.append(values if tasks.way > 2 else torch.stack([-values, values], dim=1))
        return torch.stack(logits).float().to(tasks.query_y.device)

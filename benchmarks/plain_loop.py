"""The loop as the research documents write it: what their reader would type, without this project's optimisations.

PIL transforms image by image in a DataLoader with two workers; images alone in channels-last; autocast where asked;
`.item()` and `float()` of the loss in every step; the A-step runs the student three times on a batch (once for its
features, twice more in the line of the concave-convex term) and computes penalties whose weight is zero; optimisers as
torch makes them by default. Teachers and fusion see the mixed images, so that the student's training pass is the query.
Written from their description: faults that spoil the result (docs/method.md, end of page) are left as they are.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.data.sources import ImageData
from pipeline.training.methods.asib.fusion import Fusion

WORKERS = 2


class Pictures(Dataset[tuple[Tensor, int]]):
    """The first `count` training images (repeated where there are fewer), as PIL reads them, through the transforms."""

    def __init__(self, data: ImageData, count: int) -> None:
        assert isinstance(data.train_x, Tensor)
        self.images = data.train_x.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_y.tolist()
        self.count = count
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        at = index % len(self.images)
        return self.transform(Image.fromarray(self.images[at])), self.labels[at]


class PlainLoop:
    """Networks, optimisers and steps of the plain loop.

    Args:
        config: weights, widths and rates; the networks are copied.
        batches: what the loader yields in one iteration.
        dtype: of autocast; None: off.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        student: FeatureNet,
        teachers: list[FeatureNet],
        batches: int,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.config, self.method, self.device, self.dtype = config, config.method, device, dtype
        self.student = copy.deepcopy(student).to(memory_format=torch.contiguous_format)
        self.teachers = [copy.deepcopy(t).to(memory_format=torch.contiguous_format) for t in teachers]
        for teacher in self.teachers:
            teacher.requires_grad_(False).eval()
        o, adamw = config.optim, torch.optim.AdamW
        self.optimizers = {"b": adamw(self.student.parameters(), o.student_lr, weight_decay=o.student_weight_decay)}
        self.fused = len(teachers) > 1
        if self.fused:
            widths = [t.feature_dim for t in teachers]
            self.fusion = Fusion(config.method, widths, student.feature_dim, student.num_classes).to(device)
            self.optimizers["a"] = adamw(self.fusion.parameters(), o.a_step_lr, weight_decay=o.a_step_weight_decay)
        self.loader = DataLoader(
            Pictures(data, batches * config.dataset.batch_size),
            batch_size=config.dataset.batch_size,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        self.loss_sum, self.count = 0.0, 0

    def step(self, which: str, batch: tuple[Tensor, Tensor]) -> None:
        """One update of the A- or the B-step."""
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self._a_loss(x, y) if which == "a" else self._b_loss(x, y)
            loss = torch.clamp(loss, 0.0, self.method.loss_clamp_max) if self.method.use_loss_clamp else loss
        optimizer, clip = self.optimizers[which], self.config.optim.grad_clip_norm
        optimizer.zero_grad()
        loss.backward()
        if which == "b" and clip > 0:
            nn.utils.clip_grad_norm_(self.student.parameters(), clip)
        optimizer.step()
        self.loss_sum += loss.item() * len(x)
        self.count += len(x)

    def close(self) -> None:
        """Stop the workers."""
        del self.loader

    def _synergy(self, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = [teacher(x) for teacher in self.teachers]
        tokens = [adapter(s.feat_2d) for adapter, s in zip(self.fusion.adapters, seen, strict=True)]
        z, mu, logvar = self.fusion.ib_mbm(query, torch.stack(tokens, dim=1))
        return self.fusion.head(z), mu.float(), logvar.float()

    def _a_loss(self, x: Tensor, y: Tensor) -> Tensor:
        m, tau = self.method, self.method.tau
        self.student.eval()
        self.fusion.train()
        with torch.no_grad():
            seen = self.student(x)
        z_syn, mu, logvar = self._synergy(seen.feat_2d, x)
        cw = torch.exp(-logvar).mean(dim=1).clamp(m.min_cw, m.max_cw).detach()
        ce = (cw * F.cross_entropy(z_syn, y, label_smoothing=m.label_smoothing, reduction="none")).mean()
        kd = (cw * self._divergence(z_syn, seen.logits, tau).sum(dim=1)).mean()
        ib = m.ib_beta * -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1).mean()
        with torch.no_grad():  # as written there: if the output is a tuple, the network runs again to get it
            again = self.student(x).logits if isinstance(self.student(x), tuple) else self.student(x)
        cccp = m.kd_alpha * self._divergence(z_syn, again.detach(), tau).sum(dim=1).mean()
        penalty = torch.stack([p.pow(2).mean() for p in self.fusion.parameters()]).mean()
        return m.kd_alpha * kd + m.synergy_ce_alpha * ce + ib + m.ib_mbm_reg_lambda * penalty + cccp

    def _b_loss(self, x: Tensor, y: Tensor) -> Tensor:
        m, tau = self.method, self.method.tau
        self.student.train()
        x, y_b, lam = self._cutmix(x, y)
        seen = self.student(x)
        with torch.no_grad():
            if self.fused:
                self.fusion.eval()
                target = self._synergy(seen.feat_2d.detach(), x)[0]
            else:
                target = self.teachers[0](x).logits
        smooth = m.ce_label_smoothing
        ce = lam * F.cross_entropy(seen.logits, y, label_smoothing=smooth)
        ce = ce + (1 - lam) * F.cross_entropy(seen.logits, y_b, label_smoothing=smooth)
        return m.ce_alpha * ce + m.kd_alpha * self._divergence(seen.logits, target, tau).sum(dim=1).mean()

    @staticmethod
    def _divergence(logits: Tensor, target: Tensor, tau: float) -> Tensor:
        log_q, p = F.log_softmax(logits.float() / tau, dim=1), F.softmax(target.float() / tau, dim=1)
        return tau**2 * F.kl_div(log_q, p, reduction="none")

    def _cutmix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
        """CutMix as its paper's code has it; the images are changed in place."""
        lam = float(np.random.beta(self.method.cutmix_alpha_distill, self.method.cutmix_alpha_distill))
        partner = torch.randperm(len(x), device=x.device)
        size = x.shape[-1]
        side, (row, column) = int(size * np.sqrt(1 - lam)), np.random.randint(size, size=2)
        top, bottom = (int(v) for v in np.clip((row - side // 2, row + side // 2), 0, size))
        left, right = (int(v) for v in np.clip((column - side // 2, column + side // 2), 0, size))
        x[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
        return x, y[partner], 1 - (bottom - top) * (right - left) / size**2

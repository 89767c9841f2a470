"""Errors of the paper's Tables 4, 5 and 7, in %."""

from __future__ import annotations

# Table 4: error on CIFAR-10 without and with augmentation, by the names of networks.py.
TABLE4 = {
    "resnet56": (10.05, 5.32),
    "hbnet56": (10.17, 5.46),
    "resnet110": (9.17, 5.06),
    "hbnet110": (8.66, 5.04),
    "densenet40": (7.00, 5.24),
    "agdnet40": (6.44, 5.20),
    "densenet52": (6.05, 5.09),
    "agdnet52": (5.75, 4.94),
}

# Table 5: top-1 and top-5 error on ImageNet, by the paper's names.
TABLE5 = {
    "ResNet-34": (26.73, 8.74),
    "HB-Net-34": (26.33, 8.56),
    "ResNet-50": (24.24, 7.29),
    "HB-Net-50": (23.93, 7.06),
    "ResNet-101": (22.42, 6.46),
    "HB-Net-101": (21.91, 6.07),
    "DenseNet-121": (25.02, 7.71),
    "AGD-Net-121": (24.62, 7.39),
}

# Table 7: test error, parameters in millions, search cost in GPU days, by the names of table7.py.
TABLE7 = {
    "darts": (3.00, 3.3, 0.4),
    "hb": (2.82, 2.92, 0.3),
    "hb-dagger": (2.68, 3.35, 0.3),
    "agd": (2.56, 3.3, 0.4),
}

#!/usr/bin/env bash
# Search the three spaces on 5,120 images of CIFAR-10, and retrain the cells. An interrupted run resumes.
#   bash examples/cifar10/run.sh            torchvision downloads the images
#   bash examples/cifar10/run.sh a.npz      x_train, y_train, x_test, y_test
set -euo pipefail
data=${1:-cifar10}
for space in hb agd darts; do
  init=zero
  [ $space = hb ] && init=heavy-ball
  optinspired search --space $space --init $init --data "$data" --limit 5120 --epochs 3 --channels 8 --cells 5 --out runs/cifar10/$space
  optinspired retrain runs/cifar10/$space/genotype.json --data "$data" --limit 5120 --epochs 8 --cells 8 --channels 16 --batch-size 64
  optinspired report runs/cifar10/$space
done

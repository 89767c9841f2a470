#!/usr/bin/env bash
# Everything on the results page, the most telling first, one thread a process. What is interrupted goes on, what has its
# row is not run again, and a second process that is started beside the first takes the runs that the first has not begun.
#   bash examples/reproduce/run.sh cifar10          torchvision downloads the images
#   bash examples/reproduce/run.sh a.npz            x_train, y_train, x_test, y_test
#   bash examples/reproduce/run.sh a.npz small      one part; several may follow
set -euo pipefail
data=${1:?"usage: run.sh DATA [PART ...], DATA is cifar10 or an .npz file"}
shift
here=$(dirname "$0")
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

train() { python "$here/table4.py" --data "$data" --epochs 10 --train-images 16000 "$@"; }
search() { python "$here/table7.py" --data "$data" "$@"; }

part() {
  case $1 in
    table5) python "$here/table5.py" ;;
    small) train --networks resnet20 hbnet20 --augmentation with without ;;
    deep) train --networks resnet56 hbnet56 ;;
    stability) python "$here/stability.py" --data "$data" ;;
    stability-variants)
      variants="resnet110-small-init hbnet110-small-init resnet110-no-last-relu hbnet110-post-act hbnet110-learn-beta"
      python "$here/stability.py" --data "$data" --networks resnet110-uniform-init hbnet110-uniform-init
      python "$here/stability.py" --data "$data" --networks $variants --seeds 0 1 2
      python "$here/stability.py" --data "$data" --lr 0.01 --seeds 0 1 2 ;;
    dense) train --networks densenet22 agdnet22 ;;
    controls) train --networks resnet20-no-last-relu resnet20-preact hbnet20-post-act hbnet20-learn-beta ;;
    search) search --methods darts hb hb-dagger agd ;;
    search-warm-up) search --methods darts-warm-up agd-warm-up ;;
    deep-controls) train --networks resnet56-no-last-relu ;;
    dense-plain) train --networks densenet22 agdnet22 --augmentation without ;;
    random) search --methods random-darts random-hb random-agd ;;
    dense-controls) train --networks agdnet22-alpha-1 ;;
    deep-plain) train --networks resnet56 hbnet56 --augmentation without ;;
    deep-init) train --networks resnet56-small-init hbnet56-small-init ;;
    more)
      train --networks hbnet56-learn-beta resnet56-preact hbnet56-post-act agdnet22-beta-0 \
        resnet56-uniform-init hbnet56-uniform-init ;;
    dense40) train --networks densenet40 agdnet40 --seeds 0 1 ;;
    *) echo "no part $1: see $0" >&2; exit 2 ;;
  esac
}

parts=("$@")
if [ ${#parts[@]} = 0 ]; then
  parts=(table5 small deep stability stability-variants dense controls search search-warm-up random dense-controls deep-controls dense-plain deep-plain)
fi
for name in "${parts[@]}"; do
  part "$name"
  python "$here/page.py"
done

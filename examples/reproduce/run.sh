#!/usr/bin/env bash
# All experiments of the results page, the most informative first, with one thread per process. An interrupted run
# resumes, a run that has a row is skipped, and a second process of the same command takes runs that no other has begun.
#   bash examples/reproduce/run.sh cifar10          torchvision downloads the images
#   bash examples/reproduce/run.sh a.npz            x_train, y_train, x_test, y_test
#   bash examples/reproduce/run.sh a.npz small      one part; several may be given
# Rows, figures and genotypes go to runs/reproduce/results, the page next to it; RESULTS and GENOTYPES set other folders.
set -euo pipefail
data=${1:?"usage: run.sh DATA [PART ...], DATA is cifar10 or an .npz file"}
shift
here=$(dirname "$0")
results=${RESULTS:-runs/reproduce/results}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

run() { python "$here/$1.py" --results "$results" "${@:2}"; }
train() { run table4 --data "$data" --epochs 10 --train-images 16000 "$@"; }
search() { run table7 --data "$data" --genotypes "${GENOTYPES:-$results/genotypes}" "$@"; }

part() {
  case $1 in
    table5) run table5 ;;
    small) train --networks resnet20 hbnet20 --augmentation with without ;;
    deep) train --networks resnet56 hbnet56 ;;
    stability) run stability --data "$data" ;;
    stability-variants)
      variants="resnet110-small-init hbnet110-small-init resnet110-no-last-relu hbnet110-post-act hbnet110-learn-beta"
      run stability --data "$data" --networks resnet110-uniform-init hbnet110-uniform-init
      run stability --data "$data" --networks $variants --seeds 0 1 2
      run stability --data "$data" --lr 0.01 --seeds 0 1 2 ;;
    gradients) run gradients --data "$data" ;;
    dense) train --networks densenet22 agdnet22 ;;
    controls) train --networks resnet20-no-last-relu resnet20-preact hbnet20-post-act hbnet20-learn-beta ;;
    search) search --methods darts hb hb-dagger agd ;;
    search-warm-up) search --methods darts-warm-up agd-warm-up ;;
    search-controls) search --methods random-hb-dagger hb-no-negative agd-no-negative hb-dagger-scaled ;;
    search-algorithms) search --methods admm ogm random-admm random-ogm ;;
    random) search --methods random-darts random-hb random-agd ;;
    deep-init) train --networks resnet56-small-init hbnet56-small-init ;;
    deep-controls) train --networks resnet56-no-last-relu ;;
    dense-controls) train --networks agdnet22-alpha-1 ;;
    dense-plain) train --networks densenet22 agdnet22 --augmentation without ;;
    deep-plain) train --networks resnet56 hbnet56 --augmentation without ;;
    defaults)
      run stability --data "$data" --networks hbnet110-auto resnet110-zero-init hbnet152-narrow-auto hbnet152-narrow
      train --networks hbnet20-auto resnet20-zero-init resnet20-no-last-relu-auto
      train --networks hbnet56-auto resnet56-zero-init resnet56-no-last-relu-auto
      train --networks hbnet110-auto resnet110-zero-init --seeds 0 ;;
    rates)
      for depth in 20 56 110; do
        for lr in 0.1 0.3 1 3; do
          run stability --data "$data" --steps 100 --lr $lr --seeds 0 \
            --networks hbnet$depth hbnet$depth-auto hbnet$depth-auto-final-norm \
            resnet$depth resnet$depth-zero-init resnet$depth-no-last-relu-auto
        done
      done ;;
    algorithms)
      for algorithm in gd hb agd agd2 admm tmm chebyshev ogm km halpern; do
        run stability --data "$data" --steps 100 --seeds 0 \
          --networks optnet56-$algorithm optnet56-$algorithm-residual optnet56-$algorithm-residual-plain
      done
      run stability --data "$data" --steps 100 --seeds 0 --networks optnet56-dmrnet ;;
    more)
      train --networks hbnet56-learn-beta resnet56-preact hbnet56-post-act agdnet22-beta-0 \
        resnet56-uniform-init hbnet56-uniform-init ;;
    dense40) train --networks densenet40 agdnet40 --seeds 0 1 ;;
    *) echo "no part $1: see $0" >&2; exit 2 ;;
  esac
}

parts=("$@")
if [ ${#parts[@]} = 0 ]; then
  parts=(table5 small deep stability stability-variants gradients dense controls search search-warm-up random deep-init dense-controls deep-controls dense-plain deep-plain)
fi
for name in "${parts[@]}"; do
  part "$name"
  run page
done

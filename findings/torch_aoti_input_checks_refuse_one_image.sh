#!/usr/bin/env bash
# Package:  torch 2.14.1 (CPU), AOTInductor; needs a C++ compiler
# Guess:    a program that is exported with a free batch size, and whose package runs any number of images, also runs one
#           image when AOTI_RUNTIME_CHECK_INPUTS=1 asks the package to check its inputs.
# Happens:  a free dimension has the range 2 to infinity, because 0 and 1 are special to torch.export. The exported program
#           ignores that bound and translates one image, and so does the package without checks. With checks the package
#           refuses it. The option aot_inductor.check_lowerbound=False, given when the package is compiled, leaves the other
#           checks on.
# Output:   program: 1 image (1, 4, 30, 30)
#           checks off: 3 images ok, 1 image ok
#           checks on: 3 images ok, 1 image refused: dim value is too small at 0, expected it to be >= 2, but got: 1
#           checks on, check_lowerbound=False: 3 images ok, 1 image ok
# Hurts:    whoever ships a network in an AOTInductor package and turns the checks on to be safe: batches work in every test,
#           and the single image of a user does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch

package = torch._inductor.aoti_load_package(sys.argv[1])
found = []
for count in (3, 1):
    images = "image" if count == 1 else "images"
    try:
        assert package(torch.zeros(count, 3, 32, 32)).shape == (count, 4, 30, 30)
        found.append(f"{count} {images} ok")
    except RuntimeError as error:
        found.append(f"{count} {images} refused: {str(error).splitlines()[0].partition(': ')[2]}")
print(", ".join(found))
PYTHON
cat > "$folder/compile.py" <<'PYTHON'
import sys

import torch

free = torch.export.Dim.DYNAMIC
with torch.no_grad():
    images = torch.zeros(2, 3, 32, 32)
    program = torch.export.export(torch.nn.Conv2d(3, 4, 3).eval(), (images,), dynamic_shapes=({0: free, 2: free, 3: free},))
    print("program: 1 image", tuple(program.module()(images[:1]).shape))
    for path, bound in zip(sys.argv[1:], (True, False), strict=True):
        options = {"aot_inductor.check_lowerbound": bound}
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
PYTHON
cd "$folder"
export OMP_NUM_THREADS=1
venv/bin/python compile.py "$folder/bound.pt2" "$folder/no_bound.pt2" 2> /dev/null | tee output
echo "checks off: $(venv/bin/python run.py bound.pt2 2> /dev/null)" | tee -a output
echo "checks on: $(AOTI_RUNTIME_CHECK_INPUTS=1 venv/bin/python run.py bound.pt2 2> /dev/null)" | tee -a output
echo "checks on, check_lowerbound=False: $(AOTI_RUNTIME_CHECK_INPUTS=1 venv/bin/python run.py no_bound.pt2 2> /dev/null)" | tee -a output
grep -q "^program: 1 image (1, 4, 30, 30)" output
grep -q "^checks off: 3 images ok, 1 image ok$" output
grep -q "^checks on: 3 images ok, 1 image refused: dim value is too small at 0" output
grep -q "^checks on, check_lowerbound=False: 3 images ok, 1 image ok$" output

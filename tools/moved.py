"""Scripts that are parts of a command now. Links with their old names lead here for one release."""

import os
import sys

NOW = {
    "benchmark_d3etr": "python tools/benchmark.py d3etr",
    "benchmark_icd": "python tools/benchmark.py icd",
    "benchmark_visdrone": "python tools/benchmark.py visdrone",
    "convert_conditional_detr": "python tools/convert.py conditional_detr",
    "convert_to_coco": "python tools/convert.py voc (or yolo)",
    "convert_torchvision_resnet": "python tools/convert.py resnet",
    "evaluate_teacher": "python tools/evaluate.py teacher (or assistant)",
    "evaluate_visdrone": "python tools/evaluate.py visdrone",
    "make_support_table": "python -m dev.make_support_table",
    "prepare_visdrone": "python tools/convert.py visdrone",
    "setup_env": "make setup",
    "visualize_d3etr": "python tools/visualize.py d3etr",
    "visualize_data": "python tools/visualize.py data",
    "visualize_distill": "python tools/visualize.py distill",
    "visualize_sizes": "python tools/visualize.py sizes",
}

if __name__ == "__main__":
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    now = NOW.get(name, "one of the commands that tools/README.md names")
    print(f"error: {sys.argv[0]} is now {now}, see -h", file=sys.stderr)
    sys.exit(2)

"""Pictures of data, of what is distilled, and of results by object size.

    kd-visualize data --dataset shapes_train --output sheet.png
    kd-visualize sizes --dataset visdrone_train --output sizes.png

``kd-visualize PART -h`` shows a part's flags.
"""

from ..parts import Parts

PARTS = Parts(
    __name__,
    __doc__,
    {
        "data": ("data", "a contact sheet of a data set's ground truth"),
        "sizes": ("sizes", "object sizes of a data set; detections in COCO's size bands"),
        "distill": ("distill", "what an ICD run distils in one image"),
        "pull": ("pull", "where imitation heads pull the student in one image"),
        "d3etr": ("d3etr", "what a D3ETR run distils: matching, attention, stability"),
    },
)
run = PARTS.run

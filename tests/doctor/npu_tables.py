"""What `npu-smi info` prints on cards and drivers of different kinds. Shapes are real, figures are made up."""

from __future__ import annotations

RULE = "+---------------------------+---------------+----------------------------------------------------+"
DOUBLE = RULE.replace("-", "=")
PROCESSES = "| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |"

ATLAS_A2 = f"""\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.0.3                 Version: 24.1.0.3                                             |
{RULE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{DOUBLE}
| 0     910B3               | OK            | 96.4        37                0    / 0             |
| 0                         | 0000:C1:00.0  | 3           0    / 0          3397 / 65536         |
{DOUBLE}
| 1     910B3               | Alarm         | 92.1        35                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          57783/ 65536         |
{DOUBLE}
{RULE}
{PROCESSES}
{DOUBLE}
| No running processes found in NPU 0                                                            |
{DOUBLE}
| 1       0                 | 485946        | python3.11               | 54320                   |
{DOUBLE}
"""

ATLAS_A3 = f"""\
| npu-smi 25.2.1                   Version: 25.2.1                                               |
{RULE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{DOUBLE}
| 0     Ascend910           | OK            | 166.5       38                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3131 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           37                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2886 / 65536         |
{DOUBLE}
| 1     Ascend910           | OK            | 168.1       37                0    / 0             |
| 0     2                   | 0000:99:00.0  | 0           0    / 0          3125 / 65536         |
{DOUBLE}
"""

ATLAS_300I = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi 23.0.0                                   Version: 23.0.0                                       |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 8       310P3                 | OK              | NA           42                0     / 0             |
| 0       0                     | 0000:07:00.0    | 0            1765 / 21527                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 8       310P3                 | OK              | NA           43                0     / 0             |
| 1       1                     | 0000:07:00.0    | 0            1502 / 21527                            |
+===============================+=================+======================================================+
"""

DRIVER_26 = """\
+------------------------------------------------------------------------------------------------------------------+
| npu-smi 26.0.rc1                            Version: 26.0.rc1                                                    |
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU   Name                | Health        | Power(W)             Temp(C)                 Hugepages-Usage(page)   |
| Chip                      | Bus-Id        | AICore(%)            Memory-Usage(MB)        HBM-Usage(MB)           |
+===========================+===============+======================================================================+
| 0     910B4               | OK            | 82.6                 32                      0    / 0                |
| 0                         | 0000:C1:00.0  | 0                    0    / 0                2871 / 32768            |
+===========================+===============+======================================================================+
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU     Chip              | Process id    | Process name       | Process memory(MB)    | Process id in container |
+===========================+===============+======================================================================+
| 0       0                 | 485946        | pytest             | 5175                  | NA                      |
| 0       0                 | 485947        | python             | 100                   | 17                      |
+===========================+===============+======================================================================+
"""

ASCEND_950 = """\
| npu-smi 26.1.rc1    Version: 26.1.rc1 |
| NPU ID | Name        | Health | Power(W) Temp(C) Hugepages-Usage(page) |
|        |             | Bus-Id | NPU Util(%) Memory-Usage(MB) HBM-Usage(MB) |
| 3      | Ascend950PR | OK     | 100.0 40 0 / 0 |
|        |             | NA     | 20 0 / 0 1024 / 131072 |
| NPU ID | Process id | Process name | Process memory(MB) | Process id in container |
| 3      | 1001       | python       | 256                | NA                      |
"""

FIRST_910 = """\
| npu-smi 21.0.2                   Version: 21.0.2                                               |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     910ProB             | OK            | 68.7        41                15   / 15            |
| 0                         | 0000:C1:00.0  | 0           1823 / 15039      1    / 32768         |
"""

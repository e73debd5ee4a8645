"""The compiler: one file for each analysis or pass.

Analyses (`channels`, `liveness`, `plan`) never change a graph, transformations (`trace`,
`insert_gates`, `compact`) never analyse one: the value types of the former cross between.
"""

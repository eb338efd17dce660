module picket

go 1.21

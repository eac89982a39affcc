-- Reads shapes from values[behind] on: their number; for each how many field names follow, and these. `behind` is then the index
-- of what follows them. Makes the arguments of each shape's HSET behind the key, into which each item puts its own values, and
-- tells how many fields they are. (Behind the names of fewer than six fields stand foreign values, which nobody may read.)
local arguments, sizes = { false }, { 0 }
for n = 1, values[behind] do
  local first, size = behind + 1, values[behind + 1]
  local v, f = values, first + 1
  local made = { '@', '', '@r', '', v[f], '', v[f + 1], '', v[f + 2], '', v[f + 3], '', v[f + 4], '', v[f + 5], '' }
  for k = 7, size do made[2 * k + 3] = v[first + k] end
  arguments[n], sizes[n], behind = made, size, first + size
end
behind = behind + 1

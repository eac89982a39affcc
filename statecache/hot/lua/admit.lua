-- Is this Redis the one that was found true? Asked before any stamped script is loaded, on the same connection.
--
-- KEYS   the meta of every partition
--
-- Reply  one string: the server's identity, then a line per partition
--   OK                              epoch, owner and identity match and it is ready
--   EPOCH epoch owner               another epoch, or none (0 -)
--   RECOVERING | IDENTITY           as they say
--   then a last line `deployment protocol partitions` of the first partition (- if not set)
-- Nothing is written. Cost   12 us and 1 us a partition.
--
-- Whoever finds no scripts at a server comes here first, so it is here that Lua's collector is told when to work: as soon as a
-- sixth is garbage, and then fast. As it comes it waits until half is, and the server makes it go on at each fiftieth call: one
-- call in fifty then took 350 us more. (docs/performance.md, "Lua's collector")
--@include identity
collectgarbage('setpause', 120)
collectgarbage('setstepmul', 400)
local here = identity()
local lines = { here }
for p = 1, #KEYS do
  local m = redis.call('HMGET', KEYS[p], 'epoch', 'owner', 'status', 'identity')
  if m[1] ~= EPOCH or m[2] ~= OWNER then
    lines[#lines + 1] = 'EPOCH ' .. (m[1] or '0') .. ' ' .. (m[2] or '-')
  else
    lines[#lines + 1] = (m[3] ~= 'ready' and 'RECOVERING') or (m[4] ~= here and 'IDENTITY') or 'OK'
  end
end
local first = redis.call('HMGET', KEYS[1], 'deployment', 'protocol', 'partitions')
lines[#lines + 1] = (first[1] or '-') .. ' ' .. (first[2] or '-') .. ' ' .. (first[3] or '-')
return table.concat(lines, '\n')

-- Reads which instances are due: the deadline of the state that they entered has passed.
--
-- KEYS   the meta of each partition; the key of the deadlines (due, a sorted set of "machine:id" by ms) is built from it and
--        lies in the same slot
-- ARGV 1 instances at most from each partition
--
-- Reply  one string. First line: time in ms. Then for each partition a line:
--   OK n                            then n lines `<deadline ms> <machine:id>`, oldest first
--   EPOCH | RECOVERING | IDENTITY   not admitted
-- Nothing is written. Cost   1 us a partition, 0.3 us an instance.
--@include identity
--@include ready_or_fenced
local here, time = identity(), redis.call('TIME')
local now = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
local lines = { now }
for p = 1, #KEYS do
  local code = refusal(KEYS[p], here, '')
  if code then
    lines[#lines + 1] = code
  else
    local due = string.sub(KEYS[p], 1, -5) .. 'due'
    local found = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
    lines[#lines + 1] = 'OK ' .. #found / 2
    for n = 1, #found, 2 do lines[#lines + 1] = string.format('%.0f ', tonumber(found[n + 1])) .. found[n] end
  end
end
return table.concat(lines, '\n')

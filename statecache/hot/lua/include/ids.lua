--@include order
-- The id of the log's last entry ever, `0-0` where there is no stream.
local function last_id(log)
  if redis.call('EXISTS', log) == 0 then return '0-0' end
  local info = redis.call('XINFO', 'STREAM', log)
  for n = 1, #info, 2 do
    if info[n] == 'last-generated-id' then return info[n + 1] end
  end
end

-- Entries of the log at or below the watermark. Numbers within an epoch have no holes, so they need not be counted; a
-- watermark two epochs back counts `carry`, taken when the epoch began.
local function kept(log, watermark, prev, carry)
  local e_last, s_last = string.match(last_id(log), '^(%d+)-(%d+)$')
  local e_mark, s_mark = string.match(watermark, '^(%d+)-(%d+)$')
  local e_prev, s_prev = string.match(prev or '0-0', '^(%d+)-(%d+)$')
  local behind
  if e_mark == e_last then
    behind = tonumber(s_last) - tonumber(s_mark)
  elseif e_mark == e_prev then
    behind = tonumber(s_last) + 1 + math.max(0, tonumber(s_prev) - tonumber(s_mark))
  else
    behind = tonumber(s_last) + 1 + tonumber(carry or '0')
  end
  return math.max(0, redis.call('XLEN', log) - behind)
end

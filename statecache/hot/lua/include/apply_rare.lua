-- What few items need is made when the first of them does: making a function costs each call a third of a microsecond, and half
-- as much again for each value of the script that it uses.
local function rarely(metas, rooms, prefixes, at, fields_max)
  local call, find, match = redis.call, string.find, string.match
--@include order
  -- Whether a partition's log that seems full has room: a brake that no flusher has set again for a while is let go. SQL or the
  -- flusher is away, and that is absorbed. One that was set in the future tells nothing: the clock was put back since.
  local brakes_read = {}
  local function has_room(p)
    if not brakes_read[p] then
      local m = call('HMGET', metas[p], 'limit', 'limit_max', 'limit_at')
      if m[2] and m[3] and math.abs(at - m[3]) > 3000 then rooms[p] = rooms[p] + m[2] - m[1] end
      brakes_read[p] = true
    end
    return rooms[p] > 0
  end

  -- The results of increments as [field, text, ...] and as one JSON object text; or nil and the broken rule.
  local function incremented(key, increments)
    local pairs_, texts = {}, {}
    for n = 1, #increments do
      local field, delta, kind = increments[n][1], increments[n][2], increments[n][3]
      local old = (key and call('HGET', key, field)) or '0'
      local value, add = tonumber(old), tonumber(delta)
      if not value or not add or not match(old, '^%-?%d') then return nil, 'number ' .. field end
      local result, text, whole = value + add, nil, match(old, '^%-?%d+$')
      if whole and math.abs(value) > 9007199254740991 then return nil, 'range ' .. field end
      if kind == 'i' and whole then
        if math.abs(result) > 9007199254740991 then return nil, 'range ' .. field end
        text = string.format('%.0f', result)
      else
        if math.abs(result) >= 1e300 then return nil, 'range ' .. field end
        text = string.format('%.15g', result)
        if tonumber(text) ~= result then text = string.format('%.17g', result) end
        -- Of 16 or 17 digits without a point it would be taken for a whole number the next time, beyond those that are exact.
        if math.abs(result) > 9007199254740991 and match(text, '^%-?%d+$') then text = text .. '.0' end
      end
      pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = field, text
      texts[n] = '"' .. field .. '":' .. text
    end
    return pairs_, '{' .. table.concat(texts, ',') .. '}'
  end

  -- Whether a claim keeps an item out: the answer that says so, or nil, and what the flags are from now on. A claim that has
  -- expired ends with the next move of anybody else; its own holder finds out that it is too late.
  local function kept_out(key, flags, token)
    local held = find(flags, 'c', 1, true) and call('HGET', key, '@c')
    if not held then return token ~= '' and 'FENCED - 0', '' end
    local own, until_ms, worker = match(held, '^(%S+) (%d+) %S+ (%S+)$')
    if not own then return 'TYPE' end
    local live = tonumber(until_ms) > tonumber(at)
    if live and token == own then return nil, ' c' end
    if live then return 'FENCED ' .. worker .. ' ' .. until_ms end
    return token ~= '' and 'FENCED - ' .. until_ms, ''
  end

  -- Sets the deadline of a state that has one; leaving such a state takes it away.
  local function note_deadline(p, name, deadlines, from, to)
    local due, limit = string.sub(prefixes[p], 1, -3) .. 'due', deadlines[to]
    if limit then
      call('ZADD', due, string.format('%.0f', at + limit), name)
    elseif deadlines[from] then
      call('ZREM', due, name)
    end
  end

  -- A broken rule about the number of fields, or nil. `count` is what it would be if all names were new; they stand in the
  -- arguments of HSET from the fifth on.
  local function too_many(key, count, arguments, last, unset)
    for n = 5, last, 2 do count = count - call('HEXISTS', key, arguments[n]) end
    for n = 1, unset and #unset or 0 do count = count - call('HEXISTS', key, unset[n]) end
    return count > fields_max and ('fields ' .. count) or nil
  end

  return {
    has_room = has_room, incremented = incremented, kept_out = kept_out, note_deadline = note_deadline, too_many = too_many,
    id_above = id_above,
  }
end
